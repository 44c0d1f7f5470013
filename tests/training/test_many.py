"""A grid of dictionaries on one stream: every member ends as it would have alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave import dictionaries
from unweave.activations import RowStream
from unweave.dictionaries import Dictionary, Loss, TrainingBatch
from unweave.dictionaries.topk import TopK
from unweave.errors import UnweaveError
from unweave.files import only_writer, read_tensors
from unweave.kernels import int8
from unweave.kernels.backend import why_not
from unweave.kernels.calibration import pin
from unweave.kernels.joint import JointProduct, JointWorkspace
from unweave.kernels.multiply import at_hand
from unweave.sources.arrays import ArraySource
from unweave.training import Trained, TrainingConfig, many, train, train_many
from unweave.training._steps import ClosedFormStep, make_step

D, N = 24, 64
NUMBA = pytest.mark.skipif(why_not("cpu") is not None, reason="numba is not installed (pip install numba)")
ENGINES = [
    "autograd",
    "reference",
    *(pytest.param(f"cpu+{library}", marks=NUMBA) for library in at_hand()),
    *(pytest.param(name, marks=NUMBA) for name in ("cpu+certified", "cpu+screen", "cpu+bfloat16")),
    pytest.param(
        "cpu+int8_screen", marks=[NUMBA, pytest.mark.skipif(int8.why_not() is not None, reason=str(int8.why_not()))]
    ),
]
CONFIG = TrainingConfig(n_rows=30 * N, batch_size=N, ring_rows=256, log_every=4, checkpoint_every=7, lr=1e-3)
Members = dict[str, tuple[Any, TrainingConfig]]


def rows() -> Tensor:
    g = torch.Generator().manual_seed(0)
    code = torch.rand(1000, 40, generator=g) * (torch.rand(1000, 40, generator=g) < 0.1)
    return code @ torch.randn(40, D, generator=g) + 0.5


def stream(**options: Any) -> RowStream:
    return RowStream(ArraySource(rows(), batch_rows=100, **options), seed=3)


def make(arch: str, n_features: int, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return dictionaries.build(arch, D, n_features, **options)


def members(engine: str = "reference", **changes: Any) -> Members:
    """Of different architectures, sizes, sparsities, rates, limits and first weights."""
    config = CONFIG.replace(engine=engine, **changes)
    return {
        "topk-small": (make("topk", 50, k=3), config),
        "topk-large": (make("topk", 130, k=8), config),
        "topk-seed1": (make("topk", 50, seed=1, k=3), config.replace(lr=3e-4, dead_after=2 * N)),
        "batch_topk": (make("batch_topk", 77, k=4), config.replace(grad_clip=0.05)),
        "centred-not": (make("topk", 50, k=3, subtract_bias=False), config.replace(grad_clip=None)),
        # The default threshold is some row's own score, and whether that row is above it is for the last digit to say.
        "jumprelu": (make("jumprelu", 90, target_l0=4.0, initial_threshold=0.25), config.replace(lr=1e-4)),
    }


def assert_close(ours: Dictionary, theirs: Dictionary, *, atol: float | None = None) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    for name, value in b.items():
        scale = float(value.abs().max()) if value.is_floating_point() else 0.0
        torch.testing.assert_close(a[name], value, rtol=1e-5, atol=1e-5 * scale if atol is None else atol)


def assert_same_bits(ours: Dictionary, theirs: Dictionary) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    for name, value in b.items():
        assert torch.equal(a[name], value), name


def without_speed(trained: Trained) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "rows_per_s"} for line in trained.metrics]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_member_ends_as_if_it_had_been_alone(engine):
    together = train_many(members(engine), stream())
    for name, (dictionary, config) in members(engine).items():
        alone = train(dictionary, stream(), config)
        # JumpReLU's gradient jumps where an entry crosses the edge of a window, which the last digit may decide.
        jumps = name == "jumprelu"
        assert_close(together[name].dictionary, alone.dictionary, atol=1e-3 if jumps else None)
        rel = 5e-2 if jumps else 1e-4
        for mine, other in zip(without_speed(together[name]), without_speed(alone), strict=True):
            assert mine.keys() == other.keys()
            for part, value in other.items():
                assert mine[part] == (None if value is None else pytest.approx(value, rel=rel, abs=1e-5)), part
        assert together[name].scale == alone.scale
        assert not together[name].dictionary.training


@NUMBA
def test_engines_may_differ_within_a_grid():
    mixed = {f"{e}": (make("topk", 50, k=3), CONFIG.replace(engine=e)) for e in ("autograd", "reference", "cpu")}
    mixed["cpu again"] = (make("topk", 50, k=3), CONFIG.replace(engine="cpu"))
    made = list(train_many(mixed, stream()).values())
    for other in made[1:]:
        assert_close(other.dictionary, made[0].dictionary)


def test_transcoders_learn_from_the_shared_target():
    def transcoders() -> Members:
        config = CONFIG.replace(engine="reference")
        made = {"small": 40, "large": 80}
        return {name: (make("topk", m, k=3, d_out=10, subtract_bias=False), config) for name, m in made.items()}

    def pairs() -> RowStream:
        return stream(target=3 * rows()[:, :10])

    together = train_many(transcoders(), pairs())
    for name, (dictionary, config) in transcoders().items():
        alone = train(dictionary, pairs(), config)
        assert_close(together[name].dictionary, alone.dictionary)
        assert together[name].target_scale == alone.target_scale


class Noisy(TopK):
    """Draws random numbers at the start and in every step."""

    def initialise(self, sample: Tensor, target: Tensor) -> None:
        super().initialise(sample, target)
        self.b_enc.data.add_(0.01 * torch.randn(self.n_features))

    def loss(self, batch: TrainingBatch) -> Loss:
        return super().loss(dataclasses.replace(batch, input=batch.input + 0.01 * torch.randn(batch.input.shape)))


def test_random_numbers_are_each_members_own():
    def noisy() -> Members:
        torch.manual_seed(0)
        kinds = {"one": Noisy, "quiet": TopK, "two": Noisy}
        return {name: (kind(TopK.Config(d_in=D, d_out=D, n_features=50, k=3)), CONFIG) for name, kind in kinds.items()}

    state = torch.get_rng_state()
    together = train_many(noisy(), stream())
    for name, (dictionary, config) in noisy().items():
        assert_close(together[name].dictionary, train(dictionary, stream(), config).dictionary)
    torch.set_rng_state(state)
    train_many({"one": (noisy()["one"][0], CONFIG)}, stream())
    after = torch.rand(1)
    torch.set_rng_state(state)
    noisy()
    assert torch.equal(after, torch.rand(1)), "training moved the caller's random state"


@NUMBA
def test_members_of_other_libraries_share_one_product(monkeypatch):
    """Each member's library was timed for its size; that must not part them."""
    joined: list[list[int]] = []

    class Counted(JointProduct):
        def __init__(self, encoders: Any, plan: Any) -> None:
            joined.append([len(W) for W in encoders])
            super().__init__(encoders, plan)

    monkeypatch.setattr(many, "JointProduct", Counted)
    made = members()
    names = [f"cpu+{library}" for library in at_hand()]
    for number, (name, (dictionary, config)) in enumerate(members().items()):
        made[name] = (dictionary, config.replace(engine=names[number % len(names)]))
    train_many(made, stream())
    assert joined == [[50, 130, 50, 77, 50, 90]]


@pytest.mark.parametrize("engine", ["reference", pytest.param("cpu+screen", marks=NUMBA)])
def test_encoders_have_memory_of_their_own_afterwards(engine):
    made = members(engine)
    train_many(made, stream())
    parameters = [p for dictionary, _ in made.values() for p in dictionary.parameters()]
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in parameters)


# ---- files: stopped, resumed, read back ------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stopping(made: Members, name: str, step: int) -> Members:
    """The grid stops in a member's ``step``-th step from here, after its weights have moved."""
    dictionary, calls = made[name][0], iter(range(1, 10**6))
    observe = dictionary.observe

    def observing(*arguments: Any) -> None:
        observe(*arguments)
        if next(calls) == step:
            raise Stop

    dictionary.observe = observing
    return made


@pytest.mark.parametrize("engine", ENGINES)
def test_a_grid_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(engine, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    first = train_many(members(engine), stream(), whole)
    for name, step in (("batch_topk", 5), ("topk-large", 17), ("jumprelu", 9)):  # the first before any checkpoint
        with pytest.raises(Stop):
            train_many(stopping(members(engine), name, step), stream(), broken)
        torch.rand(7)  # the caller's random state must not matter
    second = train_many(members(engine), stream(), broken)
    for name in first:
        assert_same_bits(second[name].dictionary, first[name].dictionary)
        assert without_speed(second[name]) == without_speed(first[name])
        a, b = (read_tensors(folder / name / "dictionary" / "dictionary.safetensors") for folder in (whole, broken))
        assert all(torch.equal(a[part], b[part]) for part in a)
    assert sorted(path.name for path in broken.iterdir()) == sorted(first)  # no checkpoint is left


def test_every_member_is_a_run_folder_that_train_reads_back(tmp_path):
    made = train_many(members(), stream(), tmp_path)
    for name, (dictionary, config) in members().items():
        folder = tmp_path / name
        assert {path.name for path in folder.iterdir()} == {"dictionary", "metrics.jsonl", "training.json"}
        assert json.loads((folder / "training.json").read_text())["steps"] == 30
        again = train(dictionary, stream(), config, folder)
        assert_same_bits(again.dictionary, made[name].dictionary)
        assert_same_bits(Dictionary.load(folder / "dictionary"), made[name].dictionary)


def test_a_finished_grid_is_read_back(tmp_path):
    made = train_many(members(), stream(), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = train_many(stopping(members(), "topk-small", 1), stream(), tmp_path)  # would stop if it trained
    for name in made:
        assert_same_bits(again[name].dictionary, made[name].dictionary)
        assert again[name].metrics == made[name].metrics
        assert not again[name].dictionary.training
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(UnweaveError, match=r"topk-small \(finished\).*batch_size: there 64, now 32"):
        train_many(members(batch_size=32, n_rows=30 * 32), stream(), tmp_path)


def test_another_grid_in_the_same_folder_is_refused(tmp_path):
    with pytest.raises(Stop):
        train_many(stopping(members(), "jumprelu", 10), stream(), tmp_path)
    fewer = {name: member for name, member in members().items() if name != "jumprelu"}
    with pytest.raises(UnweaveError, match=r"belongs to another grid \(.*jumprelu.*name the same members"):
        train_many(fewer, stream(), tmp_path)
    with pytest.raises(UnweaveError, match=r"step 7.*lr: there 0\.001, now 0\.5"):
        train_many(members(lr=0.5), stream(), tmp_path)
    with only_writer(tmp_path), pytest.raises(UnweaveError, match="another process is writing"):
        train_many(members(), stream(), tmp_path)
    train_many(members(), stream(), tmp_path)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("n_rows", 31 * N, "1920 and 1984"),
        ("batch_size", 32, "64 and 32"),
        ("seed", 4, "0 and 4"),
        ("ring_rows", 512, "256 and 512"),
        ("normalise_input", False, "True and False"),
        ("precision", "float32", "'tf32' and 'float32'"),
    ],
)
def test_members_that_would_see_other_batches_are_refused(field, value, shown):
    made = {"a": (make("topk", 50, k=3), CONFIG), "b": (make("topk", 50, k=3), CONFIG.replace(**{field: value}))}
    with pytest.raises(UnweaveError, match=f"members see the same batches, so {field} must be equal: found {shown}"):
        train_many(made, stream())


def test_one_dictionary_under_two_names_is_refused():
    dictionary = make("topk", 50, k=3)
    with pytest.raises(UnweaveError, match="the same dictionary is two members; build one for each"):
        train_many({"a": (dictionary, CONFIG), "b": (dictionary, CONFIG.replace(lr=1e-4))}, stream())


def test_no_members_are_refused():
    with pytest.raises(UnweaveError, match="expected at least one member"):
        train_many({}, stream())


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/a", "a/", "checkpoints"])
def test_names_that_are_no_folder_names_are_refused(name, tmp_path):
    with pytest.raises(UnweaveError, match="a member's name is its folder's name"):
        train_many({"fine": (make("topk", 50, k=3), CONFIG), name: (make("topk", 50, k=3), CONFIG)}, stream(), tmp_path)
    assert not list(Path(tmp_path).iterdir())


def test_a_member_of_another_width_is_refused():
    torch.manual_seed(0)
    narrow = dictionaries.build("topk", 20, 50, k=3)
    with pytest.raises(UnweaveError, match=r"takes rows of width 20 .* but the activations have 24"):
        train_many({"a": (make("topk", 50, k=3), CONFIG), "b": (narrow, CONFIG)}, stream())


@NUMBA
def test_a_member_whose_code_is_crowded_at_first_is_screened_with_its_present_weights():
    """While half of its features fire it is trained by autograd, which moves the weights behind the joint product."""
    config = CONFIG.replace(engine="cpu+screen", lr=3e-2)

    def two() -> Members:
        return {"relu": (make("relu", 60, l1_coefficient=3.0), config), "topk": (make("topk", 50, k=3), config)}

    together = train_many(two(), stream())
    for name, (dictionary, own) in two().items():
        assert_close(together[name].dictionary, train(dictionary, stream(), own).dictionary, atol=1e-3)


@NUMBA
def test_a_step_by_autograd_leaves_the_joint_shadow_at_the_present_weights():
    relu, topk = make("relu", 60).train(), make("topk", 50, k=3).train()
    joint = JointProduct([relu.W_enc, topk.W_enc], pin("cpu+screen"))
    stepper = make_step(relu, torch.optim.Adam(relu.parameters()), 1.0, lambda: pin("cpu+screen"))
    assert isinstance(stepper, ClosedFormStep)
    stepper.work = JointWorkspace(joint, 0)
    before = relu.W_enc.detach().clone()
    made, _ = stepper.run(TrainingBatch(rows()[:N], rows()[:N], None, 0.5), 1e-2, 0.5)
    assert made.code is not None
    assert made.code.pattern.is_crowded  # so this step was autograd's
    assert not torch.equal(relu.W_enc, before)
    assert torch.equal(stepper.work.encoder.copy, relu.W_enc.bfloat16())


def test_members_that_are_done_are_read_back_and_the_others_trained(tmp_path):
    some = members()
    first = train_many({name: some[name] for name in ("topk-small", "batch_topk")}, stream(), tmp_path)
    stamp = (tmp_path / "topk-small" / "training.json").stat().st_mtime_ns
    every = train_many(members(), stream(), tmp_path)
    assert list(every) == list(members())
    assert (tmp_path / "topk-small" / "training.json").stat().st_mtime_ns == stamp
    for name in first:
        assert_same_bits(every[name].dictionary, first[name].dictionary)
    alone = train_many({"jumprelu": members()["jumprelu"]}, stream())
    assert_close(every["jumprelu"].dictionary, alone["jumprelu"].dictionary, atol=1e-3)
    other = members()
    other["topk-small"] = (make("topk", 50, k=3), other["topk-small"][1].replace(lr=0.5))
    with pytest.raises(UnweaveError, match="belongs to another training: lr"):
        train_many(other, stream(), tmp_path)


def test_a_grid_and_a_training_of_one_do_not_take_each_others_checkpoints(tmp_path):
    dictionary, config = members()["topk-small"]
    train(dictionary, stream(), config.replace(keep_checkpoint=True), tmp_path / "one")
    (tmp_path / "one" / "training.json").unlink()
    with pytest.raises(UnweaveError, match="belongs to a training of one dictionary"):
        train_many({"one": members()["topk-small"]}, stream(), tmp_path)
    with pytest.raises(Stop):
        train_many(stopping(members(), "jumprelu", 10), stream(), tmp_path / "grid")
    with pytest.raises(UnweaveError, match="belongs to a grid of dictionaries"):
        train(dictionary, stream(), config, tmp_path / "grid")


def test_a_checkpoint_kept_for_each_is_refused():
    with pytest.raises(UnweaveError, match="keep_checkpoint must be off"):
        train_many(members(keep_checkpoint=True), stream())
