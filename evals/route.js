"use strict";
// What route.py (token_marks, expert_key) writes for the first layer, for the one that is chosen; and one token's gates.
const routes = JSON.parse(document.getElementById("routes").textContent);
const marks = [...document.querySelectorAll("#tokens .t")];
const layer = document.getElementById("layer"), keys = document.getElementById("experts"), detail = document.getElementById("detail");
const UNIT = 1000, COLOURS = 8;
const made = (tag, text, css) => Object.assign(document.createElement(tag), { textContent: text ?? "", className: css ?? "" });
const chosenPart = () => document.querySelector("input[name=part]:checked").value;

function expertsOf(gates) {
  const order = [...gates.keys()].filter((e) => gates[e]).sort((a, b) => gates[b] - gates[a] || a - b);
  return order.length <= 2 ? order : order.slice(0, 1);
}

function show() {
  const part = routes.parts[chosenPart()], gates = part.gates[layer.value];
  const counts = part.experts.map(() => 0);
  marks.forEach((mark, place) => {
    const own = expertsOf(gates[place]);
    if (own.length) counts[own[0]] += 1;
    mark.className = ["t", own.length ? `e${own[0] % COLOURS}` : "", place >= routes.prompt ? "said" : ""].filter(Boolean).join(" ");
    mark.lastElementChild.textContent = own.map((e) => e + 1).join("·") || "–";
    mark.title = part.experts.map((name, e) => [name, gates[place][e]]).filter(([, gate]) => gate)
      .map(([name, gate]) => `${name} ${(gate / UNIT).toFixed(3)}`).join(", ");
  });
  keys.replaceChildren(...part.experts.map((name, e) => {
    const item = made("li", "", `e${e % COLOURS}`);
    item.append(made("b", e + 1), ` ${name} `, made("small", `${((100 * counts[e]) / marks.length).toFixed(0)}\u00a0%`));
    return item;
  }));
}

function tell(place) {
  const part = routes.parts[chosenPart()], table = made("table"), head = made("tr"), token = routes.tokens[place];
  const column = (name) => Object.assign(made("th", name), { scope: "col" });
  head.append(column("layer"), ...part.experts.map((name, e) => column(`${e + 1} ${name}`)));
  const rows = part.layers.map((number, at) => {
    const row = made("tr"), gates = part.gates[at][place], own = expertsOf(gates);
    row.append(Object.assign(made("th", number), { scope: "row" }));
    row.append(...gates.map((gate, e) => made("td", (gate / UNIT).toFixed(3), own.includes(e) ? "own" : "")));
    return row;
  });
  const top = made("thead"), body = made("tbody");
  top.append(head);
  body.append(...rows);
  table.append(made("caption", `token ${place + 1} of ${marks.length}: ${JSON.stringify(token.text)}, id ${token.id}`), top, body);
  detail.replaceChildren(table);
}

let at = 0;
function go(place) {
  marks[at].tabIndex = -1;
  at = Math.min(Math.max(place, 0), marks.length - 1);
  marks[at].tabIndex = 0;
  tell(at);
}
marks.forEach((mark, place) => {
  mark.addEventListener("pointerenter", () => tell(place));
  mark.addEventListener("focus", () => go(place));
  mark.addEventListener("click", () => mark.focus());
  mark.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    marks[Math.min(Math.max(place + step, 0), marks.length - 1)].focus();
  });
});
document.getElementById("choice").addEventListener("change", (event) => {
  if (event.target.name === "part") {
    const layers = routes.parts[chosenPart()].layers, kept = layer.value;
    layer.replaceChildren(...layers.map((number, place) => Object.assign(made("option", number), { value: place })));
    layer.value = kept;
  }
  show();
  tell(at);
});
document.getElementById("choice").addEventListener("submit", (event) => event.preventDefault());
show();  // a browser may bring back what was chosen before
tell(0);
