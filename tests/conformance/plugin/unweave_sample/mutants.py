"""For every check, a dictionary that is broken in just the way that the check is there to find."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, PositiveInt
from torch import Tensor, nn

from unweave import SparseCode
from unweave.dictionaries import DictionaryConfig, Loss, TopK, TrainingBatch
from unweave.dictionaries._closed_form import Backward, Step
from unweave_sample.tied import Tied, TiedConfig

#: Name of a check to its mutant and a part of the message that it must give.
MUTANTS: dict[str, tuple[type, str]] = {}


def breaks(check: str, message: str) -> Any:
    def add(kind: type) -> type:
        kind.__doc__ = kind.__doc__ or "Broken on purpose."
        MUTANTS[check] = kind, message
        return kind

    return add


def _topk(dictionary: Any, u: Tensor) -> SparseCode:
    at = u.detach().abs().topk(dictionary.config.k, dim=1).indices
    return SparseCode.from_fixed_k(at, u.gather(1, at), dictionary.n_features)


# ---- facts --------------------------------------------------------------------------------------------------------


class Undocumented(Tied):
    pass


MUTANTS["is_documented"] = Undocumented, "no docstring"


@breaks("has_a_way_to_learn", "the trainer calls absorb")
class LearnsNowhere(Tied):
    learns_by_gradient = False


@breaks("has_a_readable_repr", "'n_features=40'")
class Nameless(Tied):
    def extra_repr(self) -> str:
        return ""


class LooseConfig(TiedConfig):
    model_config = ConfigDict(extra="ignore")


@breaks("config_goes_to_json_and_back", "'no_such_key' was accepted")
class Loose(Tied):
    Config = LooseConfig


class LimitlessConfig(DictionaryConfig):
    k: PositiveInt = 8


@breaks("refuses_an_impossible_k", "k = 41 of 40 features was accepted")
class Limitless(Tied):
    Config = LimitlessConfig


# ---- files --------------------------------------------------------------------------------------------------------


class Forgetful(Tied):
    """Something learnt is in no parameter and no buffer."""

    def __init__(self, config: TiedConfig) -> None:
        super().__init__(config)
        self.gain = 1.0

    def initialise(self, sample: Tensor, target: Tensor) -> None:
        super().initialise(sample, target)
        self.gain = 0.5

    def encode(self, x: Tensor) -> SparseCode:
        return _topk(self, self.gain * (self.check_input(x) - self.b) @ self.D.T)


MUTANTS["saves_and_loads"] = Forgetful, "after save and load: codes"


@breaks("state_dict_is_complete", "into a fresh one: codes")
class PrivateRandomness(Tied):
    def __init__(self, config: TiedConfig) -> None:
        super().__init__(config)
        self._shift = torch.randn(config.d_in)

    def encode(self, x: Tensor) -> SparseCode:
        return super().encode(x + self._shift.to(x.dtype))


@breaks("can_be_deepcopied", "after its deepcopy was zeroed")
class Shared(Tied):
    def __deepcopy__(self, memo: Any) -> Shared:
        twin = Shared(self.config)
        twin.D.data, twin.b.data = self.D.data, self.b.data
        return twin.eval()


# ---- symmetry -----------------------------------------------------------------------------------------------------


@breaks("features_can_be_permuted", "codes after permuting the features")
class Favouring(Tied):
    def encode(self, x: Tensor) -> SparseCode:
        u = (self.check_input(x) - self.b) @ self.D.T
        return _topk(self, u * torch.linspace(1, 2, self.n_features, dtype=u.dtype))


@breaks("loss_does_not_see_the_order_of_features", "loss after permuting the features")
class FavouringLoss(Tied):
    def loss(self, batch: TrainingBatch) -> Loss:
        loss = super().loss(batch)
        assert loss.code is not None
        return Loss(loss.total + 0.01 * (self.D[: self.n_features // 2] ** 4).sum(), loss.terms, loss.code)


@breaks("fold_scale_keeps_outputs", "outputs after fold_scale")
class Unfolded(Tied):
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        pass


@breaks("fold_scale_puts_codes_in_units_of_the_target", "directions after fold_scale")
class FoldedIntoAtoms(TopK):
    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        out = scale if out_scale is None else out_scale
        self.W_enc.mul_(scale)
        self.W_dec.div_(out)
        self.b_dec.div_(out)


@breaks("fold_scale_takes_a_target_of_its_own", "outputs after fold_scale(5, 0.5)")
class OneScaleForTwo(TopK):
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        super().fold_scale(scale)


@breaks("is_homogeneous", "times the distance from the centre")
class ClaimsHomogeneity(TopK):
    homogeneous = True


# ---- decoding -----------------------------------------------------------------------------------------------------


@breaks("decoder_is_linear", "against decode(a + b)")
class SecretlyCurved(Tied):
    def decode(self, code: SparseCode) -> Tensor:
        return super().decode(code) + 0.1 * (code.dense() @ self.D).tanh()


@breaks("decoder_directions_are_rows", "expected shape (40, 12), found (12, 40)")
class Columns(Tied):
    def decoder_directions(self) -> Tensor:
        return self.D.detach().T


@breaks("zeros_in_a_code_mean_nothing", "decode with explicit zeros")
class CountsEntries(Tied):
    def decode(self, code: SparseCode) -> Tensor:
        return super().decode(code) + 0.1 * code.offsets.diff()[:, None]


@breaks("refuses_codes_of_another_size", "decode took a code of 41 features")
class TakesAnyCode(Tied):
    def decode(self, code: SparseCode) -> Tensor:
        return code.dense()[:, : self.n_features] @ self.D + self.b


# ---- encoding -----------------------------------------------------------------------------------------------------


@breaks("codes_are_valid", "name a feature that their row has already")
class Stutters(Tied):
    def encode(self, x: Tensor) -> SparseCode:
        code = super().encode(x)
        at, values = (t.view(-1, self.config.k) for t in (code.indices, code.values))
        return SparseCode.from_fixed_k(torch.cat([at, at[:, :1]], 1), torch.cat([values, values[:, :1]], 1), 40)


@breaks("codes_are_not_all_empty", "no feature fires at all")
class Mute(Tied):
    def encode(self, x: Tensor) -> SparseCode:
        code = super().encode(x)
        return SparseCode.from_pattern(code.pattern, code.values * 0)


@breaks("eval_mode_is_deterministic", "codes of a second encode")
class AlwaysSampling(Tied):
    def encode(self, x: Tensor) -> SparseCode:
        code = super().encode(x)
        return SparseCode.from_pattern(code.pattern, code.values + 0.01 * torch.randn_like(code.values))


@breaks("rows_are_encoded_each_for_itself", "codes of rows encoded alone")
class BatchCentred(Tied):
    def encode(self, x: Tensor) -> SparseCode:
        x = self.check_input(x)
        return _topk(self, (x - x.mean(0)) @ self.D.T)


@breaks("gradients_do_not_change_codes", "codes with gradients on")
class TwoWays(Tied):
    def encode(self, x: Tensor) -> SparseCode:
        code = super().encode(x)
        factor = 1.01 if torch.is_grad_enabled() else 1.0
        return SparseCode.from_pattern(code.pattern, code.values * factor)


@breaks("encoding_leaves_no_trace", "n_encoded after encoding and decoding")
class Counting(Tied):
    def __init__(self, config: TiedConfig) -> None:
        super().__init__(config)
        self.register_buffer("n_encoded", torch.tensor(0))

    def encode(self, x: Tensor) -> SparseCode:
        self.n_encoded += len(x)
        return super().encode(x)


@breaks("inputs_are_left_alone", "rows after encode")
class Overwriting(Tied):
    @torch.no_grad()
    def encode(self, x: Tensor) -> SparseCode:
        return _topk(self, self.check_input(x).sub_(self.b) @ self.D.T)


# ---- inputs -------------------------------------------------------------------------------------------------------


@breaks("takes_no_rows", "stopped with")
class NeedsRows(Tied):
    def encode(self, x: Tensor) -> SparseCode:
        float(x.abs().max())
        return super().encode(x)


class WholeBatchStatistics(Tied):
    """The loss divides by the variance of the batch."""

    def loss(self, batch: TrainingBatch) -> Loss:
        loss = super().loss(batch)
        variance = (batch.target - batch.target.mean(0)).square().sum() / (len(batch.target) - 1)
        return Loss(loss.total / variance, loss.terms, loss.code, loss.reconstruction)


MUTANTS["takes_one_row"] = WholeBatchStatistics, "loss of one row"
MUTANTS["takes_constant_rows"] = WholeBatchStatistics, "loss of equal rows"


@breaks("takes_zero_rows", "code of rows of zeros: values")
class Normalising(Tied):
    def encode(self, x: Tensor) -> SparseCode:
        x = self.check_input(x)
        return _topk(self, x / x.norm(dim=1, keepdim=True) @ self.D.T)


@breaks("starts_on_any_sample", "b holds NaN after initialise on one row")
class Standardising(Tied):
    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor) -> None:
        centre = sample.mean(0)
        self.b.copy_(centre + (sample - centre).square().sum(0) / (len(sample) - 1))


@breaks("takes_rows_of_any_float_type", "stopped with RuntimeError")
class Fastidious(Tied):
    def encode(self, x: Tensor) -> SparseCode:
        self.check_input(x)
        return _topk(self, (x - self.b) @ self.D.T)


@breaks("refuses_nan_and_infinity", "encode took a row with nan")
class Credulous(Tied):
    def encode(self, x: Tensor) -> SparseCode:
        return super().encode(x.nan_to_num())


@breaks("refuses_rows_of_another_width", "encode took an input of shape (4, 13)")
class Cutting(Tied):
    def encode(self, x: Tensor) -> SparseCode:
        return super().encode(F.pad(x, (0, max(0, self.d_in - x.shape[-1])))[..., : self.d_in].reshape(-1, self.d_in))


# ---- moves --------------------------------------------------------------------------------------------------------


@breaks("moves_between_float_types", "codes in float64: found values of torch.float32")
class AlwaysSingle(Tied):
    def encode(self, x: Tensor) -> SparseCode:
        return super().encode(x).to(dtype=torch.float32)

    def decode(self, code: SparseCode) -> Tensor:
        return super().decode(code.to(dtype=self.D.dtype))


@breaks("works_in_bfloat16", "outputs in bfloat16: found torch.float32")
class ClaimsBfloat16(Tied):
    bfloat16 = True

    def decode(self, code: SparseCode) -> Tensor:
        code = code.to(dtype=torch.promote_types(code.dtype, torch.float32))
        return code.dense() @ self.D.to(code.dtype) + self.b


@breaks("moves_between_devices", "was left behind on cpu by .to()")
class Rooted(Tied):
    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self if args and str(args[0]) == "meta" else super().to(*args, **kwargs)


# ---- learning -----------------------------------------------------------------------------------------------------


@breaks("loss_is_well_formed", "its code carries a gradient")
class HoldsTheGraph(Tied):
    def loss(self, batch: TrainingBatch) -> Loss:
        return Loss(super().loss(batch).total, {}, self.encode(batch.input))


@breaks("every_parameter_gets_a_gradient", "no gradient reaches spare")
class Ornamented(Tied):
    def __init__(self, config: TiedConfig) -> None:
        super().__init__(config)
        self.spare = nn.Parameter(torch.zeros(3))


@breaks("dead_features_break_nothing", "loss with dead features: all")
class MeanOfTheLiving(Tied):
    def loss(self, batch: TrainingBatch) -> Loss:
        loss = super().loss(batch)
        living = torch.ones(40, dtype=torch.bool) if batch.dead is None else ~batch.dead
        return Loss(loss.total + self.D.norm(dim=1)[living].mean(), loss.terms, loss.code, loss.reconstruction)


@breaks("learns_an_easy_problem", "the loss on rows it has not seen went from")
class Idle(Tied):
    def loss(self, batch: TrainingBatch) -> Loss:
        loss = super().loss(batch)
        return Loss(loss.total.detach() + 0 * self.D.sum(), loss.terms, loss.code, loss.reconstruction)


@breaks("atoms_are_rows_of_the_data", "atoms are no row")
class NoRows(Tied):
    atoms_are_rows = True


@breaks("closed_form_agrees_with_autograd", "gradient of W_enc at progress")
class HalfTheGradient(TopK):
    def backward(self, step: Step) -> Backward:
        back = super().backward(step)
        back.grad = back.grad / 2
        return back


@breaks("resumes_with_the_same_bits", "after a kill at step 11 and a resume from step 8")
class KeepsTimeToItself(Tied):
    n_steps = 0

    @torch.no_grad()
    def after_step(self, loss: Loss, progress: float) -> None:
        super().after_step(loss, progress)
        self.n_steps += 1
        self.b.mul_(1 - 0.01 * (self.n_steps % 10 == 0))


@breaks("sparsity_is_honoured", "in training 5 features fire in a row, k is 3")
class Generous(Tied):
    def encode(self, x: Tensor) -> SparseCode:
        u = (self.check_input(x) - self.b) @ self.D.T
        at = u.detach().abs().topk(self.config.k + 2, dim=1).indices
        return SparseCode.from_fixed_k(at, u.gather(1, at), self.n_features)
