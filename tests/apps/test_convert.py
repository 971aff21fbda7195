"""A converted checkpoint under every command that a user has for it."""

import json
from pathlib import Path

import httpx
import pytest
import torch

from openkeye.apps.commands import main
from openkeye.common.checks import InputError
from openkeye.engine.config import EngineConfig
from openkeye.engine.loop import Engine
from openkeye.inputs.processor import Processor
from tests.apps.server_process import DEMO, serving
from tests.model.other_families import write_source

QUESTION = [{"role": "user", "content": "When does the red circle appear? " * 4}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A source without a chat template, and what `openkeye convert` makes of it."""
    folder = tmp_path_factory.mktemp("convert")
    source, _ = write_source(folder / "source", tie_word_embeddings=True)
    options = ["--indexer-heads", "2", "--indexer-head-dim", "16", "--top-k", "8", "--seed", "3"]
    assert main(["convert", "--from", str(source), "--to", str(folder / "keye"), *options]) == 0
    return source, folder / "keye"


def test_convert_says_what_came_out_and_refuses_in_one_line(folders, tmp_path, capsys):
    source, keye = folders
    assert main(["convert", "--from", str(source), "--to", str(tmp_path / "again"), "--top-k", "16"]) == 0
    said = capsys.readouterr().out
    assert "of them a fresh indexer of 16 heads of 64, top-k 16" in said
    assert main(["convert", "--from", str(source), "--to", str(keye)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["convert", "--from", str(keye), "--to", str(tmp_path / "twice")]) == 2
    assert "model_type is 'KeyeVL2'" in capsys.readouterr().err
    assert main(["convert", "--from", str(source), "--to", str(tmp_path / "odd"), "--indexer-head-dim", "24"]) == 2
    assert "power of two" in capsys.readouterr().err


def test_a_text_model_answers_questions_and_refuses_pictures(folders, capsys):
    _, keye = folders
    assert main(["ask", "--model", str(keye), "Why?", "--json", "--max-tokens", "5"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["num_frames"] == 0 and alone["num_generated_tokens"] == 5 and alone["finish_reason"] == "length"
    assert main(["ask", "--model", str(keye), "Why?", "--fps", "1"]) == 2
    assert "are about a video" in capsys.readouterr().err
    assert main(["ask", "--model", str(keye), " "]) == 2
    assert "the question is empty" in capsys.readouterr().err
    assert main(["ask", str(DEMO), "Why?", "--model", str(keye)]) == 2
    assert "is a text model, which sees no pictures or videos" in capsys.readouterr().err
    assert main(["ask", "--model", str(keye), "Why?", "--experts", "e4m3"]) == 2
    assert "dense MLP; leave the option out" in capsys.readouterr().err
    assert main(["info", str(keye), "--gpu", "80", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {part["name"] for part in told["parts"]} >= {"dense MLPs", "indexer"} and len(told["gpu"]) == 2
    assert told["active_parameters"] == told["total_parameters"]


def test_a_talk_remembers_what_was_said(folders, capsys, monkeypatch):
    from io import StringIO

    _, keye = folders
    asked = []
    generate = Engine.generate
    monkeypatch.setattr(
        Engine, "generate", lambda self, messages, **rest: asked.append(messages) or generate(self, messages, **rest)
    )
    monkeypatch.setattr("sys.stdin", StringIO("Hello?\n\nAnd now?\n"))
    assert main(["chat", "--model", str(keye), "--max-tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert [message["role"] for message in asked[1]] == ["user", "assistant", "user"]
    assert asked[1][1]["content"] and said.startswith(asked[1][1]["content"])


def test_the_engine_scores_as_transformers_does_and_selecting_everything_changes_nothing(folders):
    source, keye = folders
    prompt = "".join(text for text, _ in Processor.load(keye).template.render(QUESTION))
    assert prompt.startswith("user: When does") and prompt.endswith("\nassistant:")
    engines = {
        "dense": Engine(keye, "cpu", attention="dense"),
        "sparse": Engine(keye, "cpu"),
        "everything": Engine(keye, "cpu", config=EngineConfig(dense_up_to=1000)),
    }
    logprobs = {name: [value for *_, value in engine.score(QUESTION, " the circle")] for name, engine in engines.items()}
    from transformers import LlamaForCausalLM

    twin = LlamaForCausalLM.from_pretrained(source).eval()
    processor = engines["dense"].processor
    ids, tail = processor.tokenizer.encode_template(prompt), processor.encode_text(" the circle")
    with torch.inference_mode():
        logits = twin(torch.tensor([ids + tail])).logits[0, len(ids) - 1 : -1].float()
    expected = logits.log_softmax(-1)[range(len(tail)), tail]
    torch.testing.assert_close(torch.tensor(logprobs["dense"]), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(logprobs["everything"]), expected, atol=1e-4, rtol=1e-4)
    assert len(ids) > 16 and not torch.allclose(torch.tensor(logprobs["sparse"]), expected, atol=1e-2)


def test_a_folder_without_vision_needs_no_preprocessor_but_one_with_it_does(folders, tmp_path):
    _, keye = folders
    processor = Processor.load(keye)
    assert processor.is_text_only and processor.image_token_id == 5 and not (keye / "preprocessor_config.json").exists()
    config = json.loads((keye / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((keye / name).read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_config": {}}))
    with pytest.raises(InputError, match="preprocessor_config"):
        Processor.load(tmp_path)


def test_serve_answers_with_text_alone(folders):
    _, keye = folders
    with serving("--model", keye, "--device", "cpu") as server:
        name = httpx.get(f"{server.address}/v1/models").json()["data"][0]["id"]
        body = {"model": name, "messages": QUESTION, "max_tokens": 4}
        answer = httpx.post(f"{server.address}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
        assert answer["usage"]["completion_tokens"] == 4
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        body["messages"] = [{"role": "user", "content": [picture, {"type": "text", "text": "What?"}]}]
        refused = httpx.post(f"{server.address}/v1/chat/completions", json=body, timeout=60)
        assert refused.status_code == 400 and "text model" in refused.text
