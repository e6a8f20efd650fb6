"use strict";
// Sortable tables: a header button sorts its column, again to reverse; numbers by data-value, text by itself.
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => header.querySelector("button").addEventListener("click", () => {
    const direction = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of headers) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // absent values stay last either way
      const difference = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return direction * difference;
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  }));
}
// A printed page shows what is folded on screen.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => (part.open = true)));
