"""Tests of label.py. Each docstring is one claim.

    pytest toy/test_label.py        # a quarter of a minute, no network; the page needs Chromium
"""

import http.client
import itertools
import json
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from test_tools import refused

import diffusion_dpo as dpo
from toy import label


@pytest.fixture
def choices(tmp_path):
    """25 pairs to choose from."""
    return choose_from(tmp_path, 25, "a")


def choose_from(out, n, prefix):
    """The choices in a folder, with n pairs more, whose images have a prefix."""
    made = label.Choices(out, SimpleNamespace(count=n, prefix=prefix), seed=0)
    for number in range(n):
        made.add("a cat", [f"{prefix}-{number}-{half}.png" for half in (0, 1)])
    made.end()
    return made


def choose_first(choices):
    """Choose the first image of the pair, wherever it is shown."""
    _, left, _ = choices.shown()
    choices.choose(len(choices.lines), "right" if left else "left")


def test_choices_become_labels(choices):
    """All pairs are shown, and 2 of 25 again, each after ten others. Who always prefers the first
    image agrees with themselves, and each pair is labelled once. Chance decides who is left."""
    while choices.shown():
        choose_first(choices)
    state = choices.state()
    assert (state["turn"], state["turns"], state["decided"]) == (27, 27, 25)
    assert (state["same"], state["again"], state["complete"]) == (2, 2, True)
    table = dpo.load_pairs(str(choices.out), "train")
    assert [value for value in table["label"] if value is not None] == [1] * 25
    assert [place for place, value in enumerate(table["label"]) if value is None] == [10, 21]
    shown = [label.pair_of(line) for line in choices.lines]
    assert shown[10] in shown[:5] and shown[21] in shown[11:16]
    assert 5 < sum(line["left"] for line in choices.lines) < 22


def test_a_second_start_goes_on(choices):
    """After a kill nothing is lost. Undo brings the same pair back, with the same sides. A choice
    for an earlier turn, as by a double click or in a second tab, changes nothing."""
    for _ in range(12):
        choose_first(choices)
    before = choices.shown()
    choices.choose(12, "tie")
    again = choose_from(choices.out, 25, "a")
    after = choices.shown()
    assert again.lines == choices.lines and again.shown() == after
    again.choose(12, "left")
    assert again.shown() == after
    again.choose(13, "undo")
    assert again.shown() == before and again.state()["ties"] == 0


def test_a_second_round(choices):
    """The pairs of another policy are added to those that were chosen before. Undo brings these
    back, too."""
    while choices.shown():
        choose_first(choices)
    second = choose_from(choices.out, 10, "b")
    assert second.state()["ahead"][0] == "images/b-0-0.png"
    second.choose(27, "undo")
    assert second.shown()[0] == label.pair_of(choices.lines[-1])
    while second.shown():
        choose_first(second)
    assert second.state()["turn"] == second.state()["turns"] == 38
    assert second.state()["decided"] == 35


def write_png(file, **texts):
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    file.parent.mkdir(exist_ok=True)
    Image.new("RGB", (16, 16)).save(file, pnginfo=info)


GRAPH = {"1": {"inputs": {"text": "blurry"}}, "2": {"inputs": {"text": ["3", 0], "clip": ["9", 1]}},
         "3": {"inputs": {"value": "a cat"}}, "4": {"inputs": {"conditioning": ["2", 0]}}}
SAMPLER = {"0": {"inputs": {"negative": ["4", 0], "positive": ["2", 0]}},
           "4": {"inputs": {"conditioning": ["1", 0]}}}


@pytest.mark.parametrize("texts, prompt", [
    ({"prompt": json.dumps(GRAPH | SAMPLER)}, "a cat"),
    ({"prompt": json.dumps(GRAPH)}, "a cat"),
    ({"parameters": "a dog\nNegative prompt: ugly\nSteps: 20, Sampler: Euler"}, "a dog"),
    ({"prompt": "{torn"}, "pets"),
    ({}, "pets")])
def test_the_prompt_of_an_image(tmp_path, texts, prompt):
    """It is what ComfyUI or AUTOMATIC1111 have written into it, or else the folder's name. A text
    file beside the image goes before both."""
    file = tmp_path / "pets" / "a.png"
    write_png(file, **texts)
    assert label.prompt_of(file, tmp_path) == prompt
    file.with_suffix(".txt").write_text("a bird\n")
    assert label.prompt_of(file, tmp_path) == "a bird"
    file.with_suffix(".txt").write_text("ein Vögelchen", encoding="latin-1")
    with pytest.raises(dpo.UserError, match=r"a\.txt: 'utf-8'"):
        label.prompt_of(file, tmp_path)


@pytest.mark.parametrize("n", [4, 5])
def test_everyone_meets_everyone(n):
    """All pairs of n images come once. In the first of them every image comes once, but one if n is
    odd."""
    pairs = list(label.tournament(range(n), seed=0))
    assert {frozenset(pair) for pair in pairs} == {
        frozenset(pair) for pair in itertools.combinations(range(n), 2)}
    assert len(pairs) == n * (n - 1) / 2
    first_round = [image for pair in pairs[:n // 2] for image in pair]
    assert len(set(first_round)) == len(first_round)


def arguments(line):
    return label.parse(line.split())


def test_pairs_are_drawn_once(tiny, tmp_path, monkeypatch):
    """The two images of a pair differ, and each policy's are others. What is there is not drawn
    again. A tiny model draws at its own size and without guidance, and trains at this size."""
    (tiny / "prompts.txt").write_text("a cat\n")
    line = f"--model {tiny}/tiny-sd15 --prompts {tiny}/prompts.txt --pairs 1 --out x"
    policy = shutil.copytree(tiny / "tiny-sd15" / "unet", tmp_path / "unet")
    weights = load_file(policy / dpo.WEIGHTS_FILE)

    contents = set()
    for out, more in ("1", ""), ("1", f"--policy {policy}"), ("2", f"--policy {policy}"):
        args = arguments(f"{line} {more}")
        source = label.DrawnPairs(args, label.settings(args))
        assert (source.cfg.guidance, source.cfg.resolution) == (1.0, 64)
        (_, names), = source.make(tmp_path / out)
        contents |= {(tmp_path / out / "images" / name).read_bytes() for name in names}
        if more and out == "1":
            save_file(weights | {"conv_out.bias": torch.ones(4)}, policy / dpo.WEIGHTS_FILE)
    assert len(contents) == 6
    monkeypatch.setattr(label, "open_task", None)  # so it cannot draw any more
    assert list(source.make(tmp_path / "2")) == [("a cat", names)]
    args = arguments(f"--data x --model {tiny}/tiny-sd15 --out x")
    assert "--beta 500" in label.training_command(args, None)(100)


@pytest.fixture
def folder(tmp_path):
    """A folder with 12 images of two prompts and one that is torn."""
    for prompt, n in itertools.product(("a cat", "a dog"), range(6)):
        image = Image.effect_noise((16, 16), 9 + n)
        (tmp_path / "photos" / prompt).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "photos" / prompt / f"{n}.png")
    (tmp_path / "photos" / "a dog" / "torn.png").write_bytes(b"no image")
    return tmp_path / "photos"


@pytest.fixture
def served(folder, tmp_path):
    """The address of a page with 11 pairs of the folder, and the choices."""
    source = label.ExistingPairs(arguments(f"--data {folder} --pairs 11 --out x"))
    choices = label.Choices(tmp_path / "out", source, seed=0)
    for pair in source.make(choices.out):
        choices.add(*pair)
    choices.end()
    shutil.copy(folder / "a cat" / "0.png", choices.out / "other.png")
    server = label.make_server(0, choices, "train on {}".format)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, choices
    server.shutdown()
    server.server_close()


LEFT = json.dumps({"start": label.START, "turn": 0, "choice": "left"})


@pytest.mark.parametrize("status, method, path, body, headers", [
    (200, "POST", "/choice", LEFT, {}),
    (400, "POST", "/choice", LEFT.replace("left", "best"), {}),
    (400, "POST", "/choice", '{"turn": 0', {}),
    (400, "POST", "/choice", '[1]', {}),
    (400, "POST", "/choice", LEFT, {"Content-Type": "text/plain"}),
    (400, "POST", "/choice", LEFT, {"Content-Length": "9999"}),
    (403, "POST", "/choice", LEFT, {"Origin": "http://evil.example"}),
    (403, "GET", "/state", None, {"Host": "evil.example:80"}),
    (404, "GET", "/images/../other.png", None, {}),
    (501, "PUT", "/choice", "{}", {})])
def test_requests(served, status, method, path, body, headers):
    """A choice is taken from the page alone. Other hosts, paths and texts are refused."""
    port, choices = served
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(method, path, body, {"Content-Type": "application/json"} | headers)
    assert connection.getresponse().status == status
    assert len(choices.lines) == (status == 200)


def test_what_cannot_be_shown(tiny, folder, tmp_path):
    """It is refused in one line."""
    drawn = f"--model {tiny}/tiny-sd15 --out {tmp_path}"
    refused("--prompts is missing", label, drawn)
    refused("is missing; it says what is shown", label, "--out x")
    refused("--guidance: it has no meaning", label, f"--data {folder} --guidance 2 --out x")
    refused("it lies in --data", label, f"--data {folder} --out {folder}/out")
    refused("holds other files", label, f"--data {folder} --out {tmp_path}")
    shutil.rmtree(folder / "a dog")
    shutil.rmtree(folder / "a cat")
    write_png(folder / "a cat" / "1.png")
    refused("no two of its images", label, f"--data {folder} --out x")


def test_the_page(served, tiny, tmp_path):
    """A person chooses by keys, mouse and touch, takes choices back, and reloads the page in the
    middle. In the end it says how to train, and the choices train."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or pytest.skip("there is no chromium")
    port, choices = served
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_context(has_touch=True).new_page()
        page.goto(f"http://127.0.0.1:{port}")

        def do(action, turn):
            action()
            sync_api.expect(page.locator("#done")).to_contain_text(f"{turn} of 12")
            page.wait_for_selector("#pair[aria-busy=false], #pair[hidden]", state="attached")

        def press(key, turn):
            do(lambda: page.keyboard.press(key), turn)

        do(lambda: None, 0)
        for side in ("left", "right"):
            assert page.get_attribute(f"#{side}-image", "src") == choices.state()[side]
        press("ArrowLeft", 1)
        press("ArrowRight", 2)
        press(" ", 3)
        lines = choices.lines
        assert [line["answer"] for line in lines] == [
            1 - lines[0]["left"], lines[1]["left"], 0.5]
        press("Backspace", 2)
        do(lambda: page.click("#left"), 3)
        do(lambda: page.tap("#right"), 4)
        left, right = choices.lines[2:]
        assert (left["answer"], right["answer"]) == (1 - left["left"], right["left"])
        do(page.reload, 4)
        page.evaluate("state.start = 'an earlier one'")
        with page.expect_navigation():
            page.keyboard.press("ArrowLeft")  # not taken; the page reloads
        do(lambda: None, 4)
        for turn in range(5, 13):
            press("ArrowLeft", turn)
        sync_api.expect(page.locator("#agreement")).to_contain_text("of 1 pairs")
        assert page.inner_text("#command").startswith("train on ")
        browser.close()

    line = f"--model {tiny}/tiny-sd15 --data {choices.out} --resolution 16 --steps 1 --batch 11"
    dpo.main([*line.split(), "--sample-every", "0", "--out", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["unreadable"] == 0
