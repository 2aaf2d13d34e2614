"""AlphaSchedule: what alpha is at each step, where it is written, and that training goes on where it was stopped."""

import copy
import re

import pytest
import torch
from torch import nn

import diffmax
from diffmax import DiffmaxBisectModule, HillMap, diffmax_bisect
from diffmax.nn import (
    AlphaSchedule,
    DiffAttention,
    DiffAttentionV2,
    DiffmaxAttention,
    Elastic,
    LazyAttention,
    Sink,
    param_groups,
)

SHARES = {
    "linear": [0, 0, 0, 0.25, 0.5, 0.75, 1, 1],
    "cosine": [0, 0, 0, 0.1464, 0.5, 0.8536, 1, 1],
    "constant": [0, 0, 1, 1, 1, 1, 1, 1],
}


@pytest.mark.parametrize("shape", SHARES)
@pytest.mark.parametrize("start", [1.0, 0.95, 0.2])
def test_alpha_goes_from_start_to_its_end(shape, start):
    schedule = AlphaSchedule(0.6, steps=4, start=start, shape=shape, warmup=2)
    for share in SHARES[shape]:
        assert schedule.share == pytest.approx(share, abs=1e-4)
        assert float(schedule()) == pytest.approx(start + (0.6 - start) * share, abs=1e-4)
        schedule.step()
    assert schedule() == 0.6
    assert isinstance(schedule(), float)  # which the kernels know best


def test_at_the_start_it_is_softmax():
    x = torch.randn(3, 7)
    schedule = AlphaSchedule(torch.tensor([[0.5], [0.6], [0.7]]), steps=10)
    torch.testing.assert_close(diffmax_bisect(x, schedule), x.softmax(-1))
    torch.testing.assert_close(DiffmaxBisectModule(schedule)(x), x.softmax(-1))
    schedule.step(10)
    assert torch.equal(diffmax_bisect(x, schedule), diffmax_bisect(x, torch.tensor([[0.5], [0.6], [0.7]])))


def model():
    return nn.ModuleDict(
        {
            "number": DiffmaxBisectModule(0.6),
            "buffer": DiffmaxBisectModule(torch.full((2, 1, 1), 0.7)),
            "attention": DiffmaxAttention(8, 2, alpha=0.8),
            "heads": DiffmaxAttention(8, 2, alpha=torch.tensor([0.5, 0.9])),
            "inside": Elastic(Sink(DiffmaxBisectModule(0.4)), heads=2),
            "learned": DiffmaxBisectModule(0.9, alpha_map=HillMap(c=0.5)),
            "parameter": DiffmaxBisectModule(nn.Parameter(torch.tensor(0.9))),
            "function": DiffmaxBisectModule(lambda: 0.3),
        }
    )


def alphas(modules):
    return {
        name: torch.as_tensor(module.normalize.normalize.alpha if name == "inside" else module.current_alpha).detach().clone()
        for name, module in modules.items()
    }


def test_of_a_model_each_alpha_that_is_not_learned_goes_to_what_it_was():
    made = model()
    keys, ends = set(made.state_dict()), alphas(made)
    schedule = AlphaSchedule(made, steps=4, shape="linear")
    fixed = ("learned", "parameter", "function")
    for step in range(6):
        for name, alpha in alphas(made).items():
            share = 1 if name in fixed else min(1, step / 4)
            torch.testing.assert_close(alpha, 1 + (ends[name] - 1) * share, atol=1e-6, rtol=0)
        assert set(made.state_dict()) == keys
        schedule.step()
    assert (made["number"].alpha, made["attention"].alpha) == (0.6, 0.8)
    for name, alpha in alphas(made).items():
        assert torch.equal(alpha, ends[name])


def test_attention_on_the_way_is_attention_with_that_alpha():
    attend, x = DiffmaxAttention(8, 2, alpha=0.5), torch.randn(1, 5, 8)
    schedule = AlphaSchedule(attend, steps=2, shape="linear")
    schedule.step()
    halfway = copy.deepcopy(attend.half().float())
    torch.testing.assert_close(halfway.alpha, torch.tensor(0.75))
    other = DiffmaxAttention(8, 2, alpha=0.75)
    other.load_state_dict(attend.state_dict())
    torch.testing.assert_close(attend(x), other(x))


@pytest.mark.parametrize("model_first", [True, False])
def test_training_goes_on_where_it_was_stopped(model_first):
    """A model that was saved on the way holds the alphas of that step, which are not where they are to go."""
    first = model()
    schedule = AlphaSchedule(first, steps=4)
    schedule.step(2)
    saved = copy.deepcopy((first.state_dict(), schedule.state_dict()))
    again = model()
    if model_first:
        again.load_state_dict(saved[0])
        resumed = AlphaSchedule(again, steps=4)
    else:
        resumed = AlphaSchedule(again, steps=4)
        again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for _ in range(3):
        torch.testing.assert_close(alphas(again), alphas(first))
        schedule.step()
        resumed.step()
    torch.testing.assert_close(alphas(again), alphas(model()))


def test_a_copy_that_a_state_dict_leaves_behind_warns():
    """The alpha that moves is in no state dict where it began as a float: an average of the weights would stay at softmax."""
    trained = DiffmaxAttention(8, 2, alpha=0.5)
    schedule = AlphaSchedule(trained, steps=4)
    average = copy.deepcopy(trained)
    with pytest.warns(UserWarning, match=r"alpha stays what it was when this module was copied .*\npass alpha as a tensor"):
        average.load_state_dict(trained.state_dict())
    follows = AlphaSchedule(average, steps=4)  # its own schedule
    for _ in range(4):
        schedule.step()
        follows.step()
        average.load_state_dict(trained.state_dict())
        assert average.alpha == trained.alpha
    assert average.alpha == 0.5
    trained = DiffmaxAttention(8, 2, alpha=torch.tensor(0.5))
    schedule = AlphaSchedule(trained, steps=4)
    average = copy.deepcopy(trained)
    for _ in range(4):
        schedule.step()
        average.load_state_dict(trained.state_dict())
        assert average.alpha == trained.alpha


def test_the_state_goes_through_a_file(tmp_path):
    schedule = AlphaSchedule(model(), steps=4)
    torch.save(schedule.state_dict(), tmp_path / "schedule.pt")
    schedule.load_state_dict(torch.load(tmp_path / "schedule.pt", weights_only=True))
    with pytest.raises(ValueError, match="is it of another module"):
        AlphaSchedule(0.5, steps=4).load_state_dict(torch.load(tmp_path / "schedule.pt", weights_only=True))


def test_in_a_plain_loop_with_learned_alphas_beside():
    made = nn.Sequential(DiffmaxAttention(8, 2, alpha=0.5), DiffmaxAttention(8, 2, alpha_map=HillMap(c=0.5)))
    optimizer, schedule = torch.optim.AdamW(param_groups(made, 1e-2)), AlphaSchedule(made, steps=3)
    x = torch.randn(2, 5, 8)
    for _ in range(5):
        optimizer.zero_grad()
        (made(x) - x).square().mean().backward()
        optimizer.step()
        schedule.step()
    assert made[0].alpha == 0.5
    assert not torch.equal(made[1].current_alpha, torch.full((2,), 0.9))


def test_a_compiled_model_is_not_compiled_again_at_each_step():
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    attend, x = DiffmaxBisectModule(0.5), torch.randn(4, 6)
    schedule = AlphaSchedule(attend, steps=5, shape="linear")
    run = torch.compile(attend, backend=backend)
    for step in range(8):
        wanted = diffmax_bisect(x, torch.tensor(max(0.5, 1 - 0.1 * step)))
        torch.testing.assert_close(run(x), wanted, atol=1e-6, rtol=1e-5)
        schedule.step()
    assert len(compiled) == 2  # while it moves, and at the end


@pytest.fixture
def bert():
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'diffmax-core[transformers]'")
    config = transformers.BertConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=9,
        attention_probs_dropout_prob=0,
    )
    return transformers.BertModel(config).eval()


def test_a_schedule_is_the_alpha_of_a_registered_attention(bert):
    from diffmax.integrations.transformers import register

    ids = torch.randint(9, (2, 7))
    softmax = bert(ids).last_hidden_state
    register("diffmax-half", 0.5)
    bert.set_attn_implementation("diffmax-half")
    half = bert(ids).last_hidden_state
    schedule = AlphaSchedule(0.5, steps=10)
    register("diffmax-scheduled", schedule)
    bert.set_attn_implementation("diffmax-scheduled")
    torch.testing.assert_close(bert(ids).last_hidden_state, softmax, atol=1e-5, rtol=1e-5)
    schedule.step(10)
    assert torch.equal(bert(ids).last_hidden_state, half)


@pytest.mark.slow
def test_a_compiled_model_of_transformers_follows_its_schedule(bert):
    from diffmax.integrations.transformers import register

    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    ids, schedule = torch.randint(9, (2, 7)), AlphaSchedule(0.5, steps=5)
    register("diffmax-compiled", schedule)
    bert.set_attn_implementation("diffmax-compiled")
    run, counts = torch.compile(bert, backend=backend), []
    with torch.no_grad():
        for _ in range(5):
            torch.testing.assert_close(run(ids).last_hidden_state, bert(ids).last_hidden_state)
            counts.append(len(compiled))
            schedule.step()
    assert len(set(counts[1:])) == 1  # on Python 3.13 Dynamo makes a second graph at the second call


def test_an_adapted_model_goes_from_softmax_to_its_heads(bert):
    from diffmax.integrations.transformers import calibrate, replace

    ids = torch.randint(9, (2, 7))
    softmax = bert(ids).last_hidden_state
    replace(bert, calibrate(bert, [{"input_ids": ids}], alpha=0.5))
    adapted = bert(ids).last_hidden_state
    schedule = AlphaSchedule(bert, steps=3)
    torch.testing.assert_close(bert(ids).last_hidden_state, softmax, atol=1e-5, rtol=1e-5)
    for _ in range(3):
        schedule.step()
    assert torch.equal(bert(ids).last_hidden_state, adapted)


def test_the_trainers_callbacks_move_it():
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'diffmax-core[transformers]'")
    from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState

    from diffmax.integrations.transformers import alpha_callback

    schedule, state, logs = AlphaSchedule(0.5, steps=10, shape="linear"), TrainerState(), {"loss": 1.0}
    handler = CallbackHandler([alpha_callback(schedule)], nn.Linear(1, 1), None, None, None)
    assert isinstance(handler.callbacks[0], transformers.TrainerCallback)
    state.global_step = 4  # as in a run that is resumed
    handler.on_step_begin(None, state, TrainerControl())
    handler.on_log(None, state, TrainerControl(), logs)
    assert float(schedule()) == pytest.approx(0.8)
    assert logs == {"loss": 1.0, "alpha_share": 0.4}
    state.global_step = 10
    handler.on_train_end(None, state, TrainerControl())
    assert schedule() == 0.5
    with pytest.raises(TypeError, match=r"alpha_callback: schedule must be a diffmax.nn.AlphaSchedule, got float"):
        alpha_callback(0.5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: AlphaSchedule(1.5, 4), ValueError, "alpha must lie strictly between 0 and 1, got 1.5"),
        (lambda: AlphaSchedule("0.5", 4), TypeError, "alpha must be a float or a tensor, or a module, got '0.5'"),
        (lambda: AlphaSchedule(0.5, 4.0), TypeError, "steps must be an int, got 4.0 of type float"),
        (lambda: AlphaSchedule(0.5), ValueError, 'steps must be at least 1 with shape "cosine", got 0'),
        (lambda: AlphaSchedule(0.5, -1), ValueError, "steps must not be negative, got -1"),
        (lambda: AlphaSchedule(0.5, 4, warmup=-1), ValueError, "warmup must not be negative, got -1"),
        (lambda: AlphaSchedule(0.5, 4, warmup=True), TypeError, "warmup must be an int, got True"),
        (lambda: AlphaSchedule(0.5, 4, start=0.0), ValueError, "start must satisfy 0 < start <= 1, got 0.0"),
        (lambda: AlphaSchedule(0.5, 4, start="1"), TypeError, "start must be a float, got '1' of type str"),
        (
            lambda: AlphaSchedule(0.5, 4, shape="step"),
            ValueError,
            'shape must be "constant", "linear" or "cosine", got \'step\'',
        ),
        (
            lambda: AlphaSchedule(nn.Linear(2, 2), 4),
            ValueError,
            "the module must have attention or rows with an alpha that is not learned, got Linear",
        ),
        (lambda: AlphaSchedule(0.5, 4).step(-1), ValueError, "step must not be negative, got -1"),
        (lambda: AlphaSchedule(DiffmaxBisectModule(0.5), 4)(), TypeError, "a schedule of a module writes into it"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=re.escape(words)) as raised:
        call()
    assert str(raised.value).startswith("AlphaSchedule: ")


def test_a_tensor_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"AlphaSchedule: alpha must lie between 0 and 1, got 1.5"):
        AlphaSchedule(torch.tensor(1.5), 4)


def test_attention_takes_what_a_schedule_gives():
    q, schedule = torch.randn(1, 2, 5, 4), AlphaSchedule(torch.tensor([0.5, 0.8]), 4)
    out = diffmax.attention(q, q, q, alpha=schedule())
    torch.testing.assert_close(out, nn.functional.scaled_dot_product_attention(q, q, q))


@pytest.mark.parametrize("kind", [DiffAttention, DiffAttentionV2, LazyAttention, DiffmaxAttention])
def test_attention_of_every_kind_with_diffmax_weights_moves(kind):
    options = {} if kind is DiffmaxAttention else {"weights": "diffmax"}
    module, x = kind(16, 2, alpha=0.5, **options), torch.randn(1, 6, 16)
    arrived = module(x)
    schedule = AlphaSchedule(torch.nn.ModuleDict({"a": module}), steps=2)
    assert float(module.alpha) == 1
    assert (module(x) - arrived).abs().max() > 1e-4  # softmax
    schedule.step(2)
    assert module.alpha == 0.5
    torch.testing.assert_close(module(x), arrived)


@pytest.mark.parametrize(
    "module", [LazyAttention(16, 2), DiffAttention(16, 2), torch.nn.Linear(2, 2)], ids=lambda m: type(m).__name__
)
def test_softmax_weights_have_no_alpha_to_move(module):
    with pytest.raises(ValueError, match="must have attention or rows with an alpha that is not learned, got"):
        AlphaSchedule(module, steps=2)


def test_a_state_of_something_else_is_refused():
    with pytest.raises(ValueError, match=r"state must hold step and ends, got \['last_epoch'\]"):
        AlphaSchedule(0.5, steps=2).load_state_dict({"last_epoch": 3})


@pytest.mark.parametrize("steps", [0, 3])
def test_a_second_schedule_has_the_target_of_one_that_has_not_arrived(steps):
    module = DiffmaxAttention(16, 2, alpha=0.5)
    first = AlphaSchedule(module, steps=5)
    first.step(steps)
    second = AlphaSchedule(copy.deepcopy(module), steps=5)
    assert float(second._scheduled[0].owner.alpha) == 1
    second.step(5)
    assert second._scheduled[0].owner.alpha == 0.5
    first.step(5)
    assert module.alpha == 0.5
    module.alpha = 0.7  # after it has arrived, what is there is the target
    third = AlphaSchedule(module, steps=1)
    third.step(1)
    assert module.alpha == 0.7
