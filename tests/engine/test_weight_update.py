"""New weights in a running engine are those of a checkpoint, bit by bit, and nothing of the old ones is served after them."""

import shutil

import pytest
import torch

from openkeye.common.checks import InputError
from openkeye.engine import scheduler
from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.loop import Engine
from openkeye.engine.prefix_cache import page_keys
from openkeye.engine.update_file import read_update, update_path, updates_from, write_update
from openkeye.engine.weight_update import Delta, WeightUpdate, apply_update, changes_between
from openkeye.inputs.processor import BUNDLED_DIR
from openkeye.model.weights import load_model, save_model
from tests.engine.other_weights import changed, published
from tests.engine.test_loop import QUESTIONS, all_pages_are_accounted_for, chat

SAMPLING = SamplingParameters(max_new_tokens=6, logprobs=0)
LONG = [{"role": "user", "content": "Count the stars and the circles, and tell when each is seen. " * 12}]


@pytest.fixture(scope="module")
def old():
    return published()


@pytest.fixture(scope="module")
def new(old):
    return changed(old)


@pytest.fixture(scope="module")
def checkpoint(new, tmp_path_factory):
    """A folder with the new weights."""
    folder = tmp_path_factory.mktemp("new")
    shutil.copytree(BUNDLED_DIR, folder, dirs_exist_ok=True)
    model = load_model(BUNDLED_DIR, "cpu")
    model.load_state_dict(new)
    save_model(model, folder)
    return folder


def state(engine: Engine) -> dict[str, torch.Tensor]:
    """Every parameter and scale, as bits."""
    model = engine.runner.model
    tensors = dict(model.named_parameters()) | {name: buffer for name, buffer in model.named_buffers() if buffer is not None}
    return {name: tensor.detach().contiguous().view(torch.uint8) for name, tensor in tensors.items()}


def said(engine: Engine, messages: list[dict]) -> list[tuple[int, float]]:
    """Tokens with their logprobs."""
    request, events = engine.prepare(messages, SAMPLING), []
    request.on_token = events.append
    engine.scheduler.add(request)
    while engine.scheduler.has_work:
        engine.step()
    return [(event.token_id, event.logprob) for event in events]


@pytest.mark.parametrize("experts", ["auto", "e4m3"])
@pytest.mark.parametrize("is_delta", [False, True])
def test_published_weights_are_the_checkpoints_bit_by_bit(old, new, checkpoint, video, experts, is_delta):
    config = EngineConfig(experts=experts)
    engine, expected = Engine(config=config), Engine(checkpoint, config=config)
    said(engine, chat(video, QUESTIONS[0]))
    changes = changes_between(old, new) if is_delta else new
    assert is_delta is any(isinstance(change, Delta) for change in changes.values())
    apply_update(engine, WeightUpdate(1, changes, 0 if is_delta else None))
    states = state(engine), state(expected)
    assert states[0].keys() == states[1].keys() and not [
        name for name in states[0] if not states[0][name].equal(states[1][name])
    ]
    assert engine.version == 1
    # The joined projections too, the pages and the pictures.
    assert said(engine, chat(video, QUESTIONS[0])) == said(expected, chat(video, QUESTIONS[0]))


def test_a_delta_on_a_delta_is_the_whole(old, new):
    newer = changed(new, seed=1)
    for config in (EngineConfig(), EngineConfig(experts="e4m3")):
        step, whole = Engine(config=config), Engine(config=config)
        apply_update(step, WeightUpdate(1, changes_between(old, new), 0))
        apply_update(step, WeightUpdate(3, changes_between(new, newer), 1))
        apply_update(whole, WeightUpdate(3, newer))
        assert all(tensor.equal(state(whole)[name]) for name, tensor in state(step).items())


def test_only_what_changed_is_told_and_in_the_smaller_form():
    old = {"a": torch.zeros(100), "b": torch.zeros(100), "c": torch.ones(3), "d": torch.zeros(8)}
    new = {name: tensor.clone() for name, tensor in old.items()}
    new["a"][7] = 1.0
    new["b"] += 1
    new["d"][2] = -0.0
    changes = changes_between(old, new)
    assert set(changes) == {"a", "b", "d"} and changes["a"].places_N.tolist() == [7] and changes["b"] is new["b"]
    assert changes["d"].values_N.signbit().all()
    for odd in ({"a": old["a"]}, old | {"a": torch.zeros(99)}, old | {"a": old["a"].half()}):
        with pytest.raises(InputError):
            changes_between(old, odd)


def test_no_page_and_no_picture_of_old_weights_is_found(new, checkpoint, video):
    asked = (LONG, chat(video, QUESTIONS[0]))
    answers = [said(Engine(checkpoint), messages) for messages in asked]
    for flushes in (False, True):
        engine = Engine()
        assert not any(said(engine, messages) == answer for messages, answer in zip(asked, answers, strict=True))
        apply_update(engine, WeightUpdate(1, new), flushes=flushes)
        assert engine.scheduler.pool.num_idle == 0 or not flushes
        assert [said(engine, messages) for messages in asked] == answers
        assert all_pages_are_accounted_for(engine)


def test_without_the_salt_an_old_page_would_be_served(new, checkpoint, monkeypatch):
    # The check above can fail: this is the mistake that it is there for.
    monkeypatch.setattr(scheduler, "page_keys", lambda content, size, known, salt: page_keys(content, size, known))
    engine = Engine()
    said(engine, LONG)
    apply_update(engine, WeightUpdate(1, new))
    assert said(engine, LONG) != said(Engine(checkpoint), LONG)


def test_pictures_are_kept_where_tower_and_projector_stay(old, new, video):
    engine = Engine()
    said(engine, chat(video, QUESTIONS[0]))
    apply_update(engine, WeightUpdate(1, {name: new[name] for name in new if not name.startswith(("visual.", "mlp_AR."))}))
    encode, calls = engine.runner.encode, []
    engine.runner.encode = lambda patches: calls.append(1) or encode(patches)
    said(engine, chat(video, QUESTIONS[0]))
    assert not calls
    apply_update(engine, WeightUpdate(2, {name: new[name] for name in new if name.startswith("mlp_AR.")}))
    said(engine, chat(video, QUESTIONS[0]))
    assert calls


@pytest.mark.parametrize("keeps_keys", [False, True])
def test_running_requests_go_on_and_leave_no_mixed_page_behind(new, checkpoint, keeps_keys):
    engine, expected = Engine(), Engine(checkpoint)
    # No answer ends before its last token.
    engine.stop_ids = expected.stop_ids = frozenset()
    request = engine.prepare(LONG, SamplingParameters(max_new_tokens=70))
    request.keeps_answer = True
    engine.scheduler.add(request)
    for _ in range(4):
        engine.step()
    first = list(request.output_ids)
    apply_update(engine, WeightUpdate(1, new), keeps_keys=keeps_keys)
    assert request.has_stale_keys is keeps_keys
    while engine.scheduler.has_work:
        engine.step()
    assert request.output_ids[: len(first)] == first and len(request.output_ids) > len(first)
    # Pages of the same weights may be found: then products are of other shapes, and round otherwise.
    assert said(engine, LONG) == [(token, pytest.approx(logprob, abs=1e-5)) for token, logprob in said(expected, LONG)]
    assert all_pages_are_accounted_for(engine)


def test_what_does_not_fit_changes_nothing(old, new):
    engine = Engine()
    before = {name: tensor.clone() for name, tensor in state(engine).items()}
    head = new["lm_head.weight"]
    delta = Delta(tuple(head.shape), torch.tensor([0], dtype=torch.int32), head.view(-1)[:1])
    wrong = [
        (WeightUpdate(1, new | {"nobody.weight": head}), "no such tensor"),
        (WeightUpdate(1, new | {"lm_head.weight": head[1:]}), "came as"),
        (WeightUpdate(1, new | {"lm_head.weight": delta}), "names no base"),
        (WeightUpdate(3, {"lm_head.weight": delta}, 2), "from version 2 for an engine of version 0"),
        (WeightUpdate(1, {"lm_head.weight": Delta(delta.shape, delta.places_N + head.numel(), delta.values_N)}, 0), "outside"),
    ]
    for update, message in wrong:
        with pytest.raises(InputError, match=message):
            apply_update(engine, update)
    assert engine.version == 0 and all(tensor.equal(before[name]) for name, tensor in state(engine).items())
    apply_update(engine, WeightUpdate(2, {}))
    with pytest.raises(InputError, match="give a newer one"):
        apply_update(engine, WeightUpdate(2, {}))
    with pytest.raises(InputError, match="versions begin with 1"):
        WeightUpdate(0, {})


def test_a_file_holds_an_update_whole_or_is_refused(old, new, tmp_path):
    update = WeightUpdate(2, changes_between(old, new), 1)
    path = write_update(tmp_path, update)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name] == ["version-00000002.safetensors"]
    read = read_update(path)
    assert (read.version, read.base, read.changes.keys()) == (2, 1, update.changes.keys())
    for name, change in update.changes.items():
        if isinstance(change, Delta):
            assert read.changes[name].shape == change.shape and read.changes[name].places_N.equal(change.places_N)
            assert read.changes[name].values_N.equal(change.values_N)
        else:
            assert read.changes[name].equal(change)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        read_update(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        read_update(path)


def test_the_way_to_the_newest_version_is_found(tmp_path):
    for version, base in ((1, None), (2, 1), (4, 2), (5, None), (6, 5)):
        write_update(tmp_path, WeightUpdate(version, {"x": torch.ones(2)}, base))
    assert updates_from(tmp_path, 6) == [] and updates_from(tmp_path / "nowhere", 3) == []
    assert updates_from(tmp_path, 5) == [update_path(tmp_path, 6)]
    assert updates_from(tmp_path, 2) == updates_from(tmp_path, 0) == [update_path(tmp_path, 5), update_path(tmp_path, 6)]
    for version in (5, 6):
        update_path(tmp_path, version).unlink()
    assert updates_from(tmp_path, 1) == [update_path(tmp_path, 2), update_path(tmp_path, 4)]
    update_path(tmp_path, 2).unlink()
    with pytest.raises(InputError, match="is gone"):
        updates_from(tmp_path, 1)
    with pytest.raises(InputError, match="older than the engine's 3"):
        updates_from(tmp_path, 3)
