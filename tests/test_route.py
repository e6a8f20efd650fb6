"""`upcycle route`: the page of a mixture whose routing is known, and its numbers against a forward for each token."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from evals.route import experts_of, read_routes, render_routes
from launch.route import route
from tests.browser import Browser, needs_chromium
from tests.tiny import VOCAB, dense_models, mixture_of, told_by
from upcycle.router import RoutingTrace
from upcycle.routing import forced

WORDS = [f"w{number}" for number in range(3, VOCAB)]


def save(model, out: Path) -> Path:
    """A model directory with a tokenizer of words, "w3" being token 3."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {word: number + 3 for number, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(out)
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>").save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def by_id(tmp_path_factory) -> Path:
    """The low half of the vocabulary goes to the seed's expert, the other to code's."""
    low = np.where(np.arange(VOCAB) < VOCAB // 2, 5.0, -5.0)
    mixture = mixture_of(dense_models("llama", 3, dtype=torch.float32), attention="mixture", num_experts_per_tok=1)
    return save(told_by(mixture, "embed_tokens.weight", low), tmp_path_factory.mktemp("by_id") / "mixture")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    mixture = mixture_of(dense_models("llama", 3, dtype=torch.float32), attention="mixture")
    return save(mixture, tmp_path_factory.mktemp("drawn") / "mixture")


def labels(html: str) -> list[str]:
    marks = re.search(r'id="tokens".*?</div>', html, re.S)
    assert marks is not None
    return re.findall(r"<small>(.*?)</small>", marks.group())


def test_the_page_of_a_known_router_names_its_experts(by_id, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert route([str(by_id), "w3 w50 w60\n w4", str(out), "--new-tokens=0"]) == 0
    assert capsys.readouterr().out == f"{out}: 4 tokens of text and 0 that follow, by expert\n"
    html = out.read_text()
    assert labels(html) == ["1", "2", "2", "1"]
    assert html.count('class="t e0"') == 2 and html.count('class="t e1"') == 2
    assert '<li class="e0"><b>1</b> seed <small>50&nbsp;%</small></li>' in html
    embedded = json.loads(re.search(r'id="routes">(.*?)</script>', html, re.S).group(1))
    for part in ("ffn", "attention"):
        one, other = [1000, 0, 0], [0, 1000, 0]
        assert embedded["parts"][part]["gates"] == [[one, other, other, one]] * 2


def test_gates_of_a_generation_are_those_of_its_steps(drawn):
    """Each token's gates by a forward that ends with it, and greedy continuation one forward at a time."""
    found = read_routes(drawn, "w5 w30 w7", 6)
    model = mixture_of(dense_models("llama", 3, dtype=torch.float32), attention="mixture")
    ids = [5, 30, 7]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert [token["id"] for token in found["tokens"]] == ids and found["prompt"] == 3
    for place in range(len(ids)):
        trace = RoutingTrace()
        model(torch.tensor([ids[: place + 1]]), trace=trace)
        for part in ("ffn", "attention"):
            for layer, routing in enumerate(trace.of(part)):
                gates = [0.0] * 3
                for gate, expert in zip(routing.gates[-1].tolist(), routing.experts[-1].tolist(), strict=True):
                    gates[expert] += 1000 * gate
                assert found["parts"][part]["gates"][layer][place] == pytest.approx(gates, abs=0.51)


def test_a_token_shows_one_or_two_experts():
    assert experts_of([0, 300, 700]) == [2, 1]
    assert experts_of([200, 300, 500]) == [2]
    assert experts_of([500, 500, 0]) == [0, 1]
    assert experts_of([0, 0, 0]) == []
    assert experts_of(forced(torch.zeros(1, 3), 2, 1).gates.int().tolist()[0]) == [0]


def test_the_page_needs_nothing_else_and_escapes_what_it_shows(drawn):
    routes = read_routes(drawn, "w5", 1)
    routes["tokens"][0]["text"] = "</script><b>"
    html = render_routes(routes, "<mixture>")
    assert "<b>" not in re.sub(r"<b>\d</b>", "", html) and "&lt;mixture&gt;" in html
    assert html.count("</script>") == 2
    assert "http" not in html and "url(" not in html and "@import" not in html
    assert set(re.findall(r'(?:src|href)="(.*?)"', html)) == {"data:,"}
    assert all(f".e{number} {{ --own" in html for number in range(8))
    assert "prefers-color-scheme: dark" in html


@needs_chromium
def test_a_browser_shows_what_was_written(drawn, tmp_path):
    """route.js says of the first layer what route.py wrote, and tells the first token's gates; nothing goes wrong."""
    out = tmp_path / "page.html"
    out.write_text(render_routes(read_routes(drawn, "w5 w9 w33", 5), "mixture"))
    with Browser() as browser:
        browser.open(out, 400)
        shown = browser.evaluate("document.documentElement.outerHTML")
        assert browser.complaints == [] and browser.overflow() == []
    assert labels(shown) == labels(out.read_text())
    hints = [re.findall(r'title="(.*?)"', text) for text in (shown, out.read_text())]
    assert hints[0] == hints[1] and hints[0]
    caption = re.search(r"<caption[^>]*>(.*?)</caption>", shown)
    assert caption is not None and unescape(caption.group(1)) == 'token 1 of 8: "w5", id 5'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MIX", "w3"], "route: got MIX w3, expected DIR TEXT|FILE OUT.html [--new-tokens=N]"),
        (["MIX", "w3", "OUT", "--new-tokens=few"], "expected DIR TEXT|FILE OUT.html"),
        (["MIX", "w3", "page.txt"], "expected DIR TEXT|FILE OUT.html"),
        (["DENSE", "w3", "OUT"], "model_type is 'llama', expected 'upcycled': only a mixture has routers"),
        (["nowhere/at/all", "w3", "OUT"], "no such directory"),
        (["MIX", "", "OUT"], "the text has 0 tokens and 40 are to follow"),
        (
            ["MIX", "w3 " * 30, "OUT"],
            "the text has 30 tokens and 40 are to follow, expected at least 1 and at most the model's 64",
        ),
        (["MIX", "w3", "nowhere/page.html"], "there is no directory"),
    ],
)
def test_what_the_user_can_mend_is_said(by_id, tmp_path, capsys, arguments, message):
    dense_models("llama", 1, dtype=torch.float32)[0].save_pretrained(tmp_path / "dense")
    named = {"MIX": str(by_id), "DENSE": str(tmp_path / "dense"), "OUT": str(tmp_path / "page.html")}
    assert route([named.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    for name, path in named.items():
        error = error.replace(path, name)
    assert message in error and not (tmp_path / "page.html").exists()


def test_a_file_is_read(by_id, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("w3 w4 w60")
    assert route([str(by_id), str(tmp_path / "text.txt"), str(tmp_path / "page.html"), "--new-tokens=2"]) == 0
    assert "3 tokens of text and 2 that follow" in capsys.readouterr().out
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe\x00")
    assert route([str(by_id), str(tmp_path / "text.txt"), str(tmp_path / "page.html")]) == 2
    assert "not UTF-8 text" in capsys.readouterr().err


@pytest.mark.parametrize("tensor", ["lm_head.weight", "experts.down_proj", "router.weight"])
def test_a_mixture_whose_logits_are_no_numbers_gets_no_page(drawn, tmp_path, capsys, tensor):
    broken = shutil.copytree(drawn, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    next(weight for name, weight in weights.items() if name.endswith(tensor)).fill_(torch.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert route([str(broken), "w3 w4", str(tmp_path / "page.html"), "--new-tokens=2"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"upcycle: {broken}: its logits of this text are not all finite") and said.count("\n") == 1
    assert not (tmp_path / "page.html").exists()
