"""How the weights of a model are quantized: what finetune, quantize and adapt share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qalora_compile.capture.load_source import Source
from qalora_compile.config import QuantSpec, Spec
from qalora_compile.config.choices import EMBEDDING_GROUP, LEARNED
from qalora_compile.errors import UserInputError
from qalora_compile.ir.checkpoint_codes import CheckpointCodes
from qalora_compile.passes.analysis.select_sites import ALL_LINEAR
from qalora_compile.progress import say
from qalora_compile.quantizers import needs_data


@dataclass(frozen=True, kw_only=True)
class CodesSpec(Spec):
    """Which layers are quantized, and how.

    Attributes:
        bits, group_size, method: As in `QuantSpec`; None takes its default. If all three are None,
            a checkpoint that is already quantized keeps its codes.
        budget, budget_unit: As in `QuantSpec`, for bits `"auto"`.
        learn_steps, learn_rate: As in `QuantSpec`, for the method `"learned"`; None takes its
            default.
        stored_zero_points: How a GPTQ checkpoint stores its zero-points, if its tag is wrong.
        targets, exclude: Patterns of layers to quantize (None: all linear ones) and to leave out.
        embeddings: Bits of embeddings and of the head, 8 or 4; None leaves them in float.
        embeddings_group_size: Group size of embeddings and head; None means 32.
    """

    bits: int | str | None = None
    group_size: int | str | None = None
    method: str | None = None
    budget: float | None = None
    budget_unit: str = "bits"
    learn_steps: int | None = None
    learn_rate: float | None = None
    stored_zero_points: str | None = None
    targets: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    embeddings: int | None = None
    embeddings_group_size: int | None = None

    def __post_init__(self) -> None:
        if self.method != LEARNED and (self.learn_steps, self.learn_rate) != (None, None):
            raise UserInputError(
                "--learn-steps and --learn-rate are for --method learned",
                hint="give finetune or quantize --method learned too",
            )
        if self.embeddings is None and self.embeddings_group_size is not None:
            raise UserInputError(
                "--embeddings-group-size has no use without --embeddings",
                hint="give finetune or quantize --embeddings 8 too",
            )

    @property
    def chooses(self) -> bool:
        """Whether codes are specified; then those of a quantized checkpoint are not kept."""
        return (self.bits, self.group_size, self.method) != (None, None, None)

    @property
    def needs_calibration(self) -> bool:
        """Whether the method requires calibration data."""
        return self.method is not None and needs_data(self.method)

    @property
    def layers(self) -> str | tuple[str, ...]:
        """The layers to quantize, as `quantize_groups` takes them."""
        return self.targets or ALL_LINEAR

    def quant(self, **more: Any) -> QuantSpec:
        """The `QuantSpec` of the codes, with the fields that only one command sets.

        Raises:
            UserInputError: a value is out of range.
        """
        names = ("bits", "group_size", "method", "learn_steps", "learn_rate")
        chosen = {name: getattr(self, name) for name in names}
        given: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
        return QuantSpec(**given, budget=self.budget, budget_unit=self.budget_unit, **more)

    @property
    def embedding_quant(self) -> QuantSpec | None:
        """The `QuantSpec` of embeddings; None leaves them in float."""
        if self.embeddings is None:
            return None
        size = self.embeddings_group_size
        return QuantSpec(bits=self.embeddings, group_size=EMBEDDING_GROUP if size is None else size)

    def embedding_record(self) -> dict[str, Any]:
        """The record of the embeddings in `run.json` and `qalora.json`."""
        spec = self.embedding_quant
        if spec is None:
            return {}
        return {"embeddings": {"bits": spec.bits, "group_size": spec.group_size}}


def stored_codes(codes: CodesSpec, source: Source) -> CheckpointCodes | None:
    """The codes of a quantized checkpoint that are kept unchanged; None if there are none.

    Raises:
        UserInputError: the checkpoint is broken.
    """
    stored, notes = source.stored()
    for note in notes:
        say(f"note: {note}")
    if not stored:
        return None
    if codes.chooses:
        say(
            f"note: the {len(stored)} quantized tensors of {source.reference} are requantized; "
            "without --bits, --group-size and --method they keep their codes"
        )
        return None
    return stored
