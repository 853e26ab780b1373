"""Random networks, drawn piece by piece with hypothesis."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.fuzz import pieces as P

VOCABULARY = 5
Shape = tuple[int, ...]  # without the batch: (features,), (time, features), (channels, *space) of two or more dimensions
ODD = (P.Checkpointed, P.WithTeacher, P.OnlyTheWeight, P.WeightBeside)
Draw = Callable[[Any], Any]


@dataclass
class Case:
    """A network in double precision, the batches of one step and what the Fisher matrix is asked for.

    Attributes:
        inputs: one tensor for each pass of the step.
        masks: bool, the shape of the terms of each pass; None without a mask.
        mixes: whether a row depends on several examples.
        unaligned: names of layers for which sums per example are not defined.
    """

    model: nn.Sequential
    inputs: list[Tensor]
    likelihood: str
    variance: float
    masks: list[Tensor] | None
    mixes: bool
    unaligned: set[str]


class Builder:
    """Draws pieces one after another; knows the shape that has been reached."""

    def __init__(self, draw: Draw, image: bool, masked: bool) -> None:
        self.draw, self.masked = draw, masked
        self.pieces: list[nn.Module] = []
        if image:
            dims = draw(st.integers(1, 3))
            space = [draw(st.integers(3, 6 if dims < 3 else 4)) for _ in range(dims)]
            self.shape: Shape = (draw(st.sampled_from([2, 4])), *space)
        else:
            self.shape = draw(st.sampled_from([(3,), (4,), (1, 3), (2, 4), (3, 3), (4, 2)]))
        self.image = image
        self.start = self.shape

    def add(self, piece: nn.Module, shape: Shape) -> None:
        self.pieces.append(piece)
        self.shape = shape

    def pick(self, options: Any) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def after(self) -> str:
        return self.pick(P.SMOOTH if self.masked else P.AFTER)

    def bias(self) -> bool:
        return self.pick([True, True, False])

    # -- vectors and sequences ----------------------------------------------------------------------------------

    def linear(self, out: int | None = None) -> None:
        *lead, features = self.shape
        if not lead:
            kind = self.pick([P.Piece, P.Piece, P.Unsqueezed, P.OneByOne, P.Twice, P.Residual, *ODD])
        else:
            kinds = [P.Piece, P.Flat, P.FourDimensional, P.Windows, P.TimeFirst, P.Steps, P.Chunks, P.AcrossTime, P.Cell]
            kind = self.pick([*kinds, P.Twice, P.Residual, *ODD])
        out = out or self.pick([2, 3, 4, 6])
        if kind is P.AcrossTime:
            layer, shape = nn.Linear(lead[0], out, bias=self.bias()), (out, features)
        elif kind is P.Cell:
            layer, shape = nn.Linear(features + out, out, bias=self.bias()), (*lead, out)
        elif kind in (P.Twice, P.Residual):
            layer, shape = nn.Linear(features, features, bias=self.bias()), self.shape
        elif kind is P.WeightBeside:
            layer, shape = nn.Linear(features, out, bias=self.bias()), self.shape
        else:
            layer, shape = nn.Linear(features, out, bias=self.bias()), (*lead, out)
        # Nothing can be told of a weight that no gradient reaches, behind units that are all off.
        after = self.pick(P.SMOOTH) if kind.flat else self.after()
        self.add(kind(layer, after), shape)

    def norm(self) -> None:
        *lead, features = self.shape
        options: list[tuple[type[P.Piece], nn.Module]] = [
            (P.Piece, nn.LayerNorm(features)),
            (P.Piece, nn.RMSNorm(features)),
            (P.Piece, nn.LayerNorm(features, bias=False)),
        ]
        if lead:
            options += [
                (P.Flat, nn.LayerNorm(features)),
                (P.Windows, nn.RMSNorm(features)),
                (P.Piece, nn.LayerNorm([*lead, features])),
                (P.ChannelsFirst, nn.GroupNorm(1, features)),
                (P.OverExamplesFlat, nn.BatchNorm1d(features)),
            ]
            if lead[0] > 1:
                options.append((P.ChannelsFirst, nn.InstanceNorm1d(features, affine=True)))
        else:
            options.append((P.OverExamples, nn.BatchNorm1d(features)))
            if features in (4, 6):
                options.append((P.Piece, nn.GroupNorm(2, features)))
        if self.masked:
            options = [option for option in options if option[0] is P.Piece and isinstance(option[1], nn.LayerNorm)][:1]
        kind, layer = options[self.draw(st.integers(0, len(options) - 1))]
        self.add(kind(layer, self.after()), self.shape)

    def on_vectors(self) -> None:
        features = self.shape[0]
        what = self.pick(["linear", "linear", "linear", "norm", "gain", "code", "shared", "unflatten", "halves"])
        if what == "linear":
            self.linear()
        elif what == "norm":
            self.norm()
        elif what == "gain":
            self.add(P.Gain(features), self.shape)
        elif what == "code":
            self.add(P.Code(features), self.shape)
        elif what == "shared":
            self.add(P.SharedWeight(features), self.shape)
        elif features % 2 == 0 and features > 2:
            if what == "unflatten":
                self.add(P.Unflatten((2, features // 2)), (2, features // 2))
            else:
                self.add(P.Function(self.pick(["halves", "gate"])), (features // 2,))

    def on_sequences(self) -> None:
        time, features = self.shape
        options = ["linear", "linear", "linear", "norm", "function", "attention", "positions", "gain", "own", "join"]
        what = self.pick([o for o in options if o not in ("own", "join")] if self.masked else options)
        if what == "linear":
            self.linear()
        elif what == "norm":
            self.norm()
        elif what == "function":
            same = ["cumsum", "mean of positions", "flip"]
            name = self.pick(same if self.masked else [*same, "all but the first", "every other", "repeat"])
            length = {"all but the first": time - 1, "every other": (time + 1) // 2, "repeat": 2 * time}.get(name, time)
            if 0 < length <= 8:
                self.add(P.Function(name), (length, features))
        elif what == "attention":
            self.add(P.Attention(features, self.pick([False, True]), self.pick([False, True])), self.shape)
        elif what == "positions":
            self.add(P.Positions(time, features), self.shape)
        elif what == "gain":
            self.add(P.Gain(features), self.shape)
        elif what == "own":
            self.add(self.pick([P.TorchAttention, P.Recurrent])(features), self.shape)
        else:
            name = self.pick(["pool positions", "last position", "flatten"])
            self.add(P.Function(name), (time * features,) if name == "flatten" else (features,))

    # -- images -------------------------------------------------------------------------------------------------

    def convolution(self) -> None:
        channels, *space = self.shape
        dims = len(space)
        rows = dims == 2 and self.pick([False, False, True])
        layer_dims = 1 if rows else dims
        make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[layer_dims - 1]
        groups = self.pick([1, 1, 2, channels] if channels % 2 == 0 else [1, 1, channels])
        out = groups * self.pick([1, 2] if groups > 1 else [2, 3, 4])
        kind = P.Rows if rows else self.pick([P.Piece, P.Piece, P.OneByOne, P.Twice, P.ChannelsLastMemory, P.Checkpointed])
        if kind is P.ChannelsLastMemory and dims != 2:
            kind = P.Piece
        kernel = [self.pick([1, 2, 3]) for _ in range(layer_dims)]
        mode = self.pick(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"])
        if kind is P.Twice or self.pick([False, False, True]):
            out = channels if kind is P.Twice else out
            dilation = [self.pick([1, 2]) for _ in kernel]
            largest = max(d * (k - 1) for d, k in zip(dilation, kernel))
            if mode != "zeros" and largest // 2 + 1 >= min(space):
                mode = "zeros"
            options: dict[str, Any] = {"padding": "same", "dilation": tuple(dilation), "padding_mode": mode}
            reached = space
        else:
            stride = [self.pick([1, 1, 2, 3]) for _ in kernel]
            dilation = [self.pick([1, 1, 2]) for _ in kernel]
            padding = [self.pick([0, 1, 2]) for _ in kernel]
            if mode != "zeros":
                padding = [min(p, size - 1) for p, size in zip(padding, space[-layer_dims:])]
            sizes = list(zip(space[-layer_dims:], padding, dilation, kernel, stride))
            moved = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in sizes]
            if min(moved) < 1:
                return
            reached = [*space[: dims - layer_dims], *moved]
            options = {"padding": tuple(padding), "dilation": tuple(dilation), "stride": tuple(stride), "padding_mode": mode}
        if math.prod(reached) > 80:
            return
        layer = make(channels, out, tuple(kernel), groups=groups, bias=self.bias(), **options)
        self.add(kind(layer, self.after()), (out, *reached))

    def transposed(self, channels: int, space: list[int]) -> None:
        make = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[len(space) - 1]
        groups = self.pick([1, 1, 2] if channels % 2 == 0 else [1])
        kernel, stride = [self.pick([1, 2, 3]) for _ in space], [self.pick([1, 1, 2]) for _ in space]
        padding, dilation = [self.pick([0, 0, 1]) for _ in space], [self.pick([1, 1, 2]) for _ in space]
        extra = [self.pick([0, min(1, max(s, d) - 1)]) for s, d in zip(stride, dilation)]
        sizes = zip(space, stride, padding, dilation, kernel, extra)
        reached = [(size - 1) * s - 2 * p + d * (k - 1) + e + 1 for size, s, p, d, k, e in sizes]
        if min(reached) < 1 or math.prod(reached) > 40:
            return
        layer = make(
            channels,
            2 * groups,
            tuple(kernel),
            stride=tuple(stride),
            padding=tuple(padding),
            output_padding=tuple(extra),
            dilation=tuple(dilation),
            groups=groups,
            bias=self.bias(),
        )
        self.add(P.Piece(layer, self.after()), (2 * groups, *reached))

    def on_images(self) -> None:
        channels, *space = self.shape
        dims = len(space)
        options = ["convolution", "convolution", "convolution", "norm", "pool", "transposed", "join", "join"]
        what = self.pick(options)
        if what == "convolution":
            self.convolution()
        elif what == "norm":
            group = 2 if channels % 2 == 0 and math.prod(space) > 1 else 1
            batch = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
            instance = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 1]
            norms: list[tuple[type[P.Piece], nn.Module]] = [
                (P.Piece, nn.GroupNorm(group, channels)),
                (P.OverExamples, batch(channels)),
                (P.Piece, nn.LayerNorm(list(self.shape))),
            ]
            if math.prod(space) > 1:
                norms.append((P.Piece, instance(channels, affine=True)))
            kind, layer = norms[self.draw(st.integers(0, len(norms) - 1))]
            self.add(kind(layer, self.after()), self.shape)
        elif what == "pool" and min(space) > 1:
            self.add(P.Function(self.pick(["max pool", "avg pool"])), (channels, *[size // 2 for size in space]))
        elif what == "transposed" and math.prod(space) <= 16:
            self.transposed(channels, space)
        elif what == "join":
            name = self.pick(["pool space", "flatten", "to sequence"])
            size = math.prod(space)
            shape = {"pool space": (channels,), "flatten": (channels * size,), "to sequence": (size, channels)}[name]
            if math.prod(shape) <= 24:
                self.add(P.Function(name), shape)
                self.image = False

    # -- both ends ----------------------------------------------------------------------------------------------

    def step(self) -> None:
        if self.image:
            self.on_images()
        elif len(self.shape) == 1:
            self.on_vectors()
        else:
            self.on_sequences()

    def head(self, likelihood: str) -> None:
        """To ``[batch, outputs]``, or for classes also one term per position."""
        classes = self.pick([2, 3])
        if self.image:
            dims = len(self.shape) - 1
            if likelihood == "categorical" and dims > 1 and self.pick([False, True]):
                make = (nn.Conv2d, nn.Conv3d)[dims - 2]
                self.add(P.Piece(make(self.shape[0], classes, 1)), (classes, *self.shape[1:]))
                return
            self.add(P.Function("pool space"), self.shape[:1])
            self.image = False
        if len(self.shape) == 2 and not (likelihood == "categorical" and (self.masked or self.pick([False, True]))):
            self.add(P.Function("pool positions"), self.shape[1:])
        *lead, features = self.shape
        table = getattr(self.pieces[0], "layer", None) if self.pieces else None
        if isinstance(table, nn.Embedding) and table.embedding_dim == features and self.pick([False, True]):
            self.add(P.TiedHead(table), (*lead, table.num_embeddings))
            self.pieces[0].flat = True
            return
        self.add(P.Piece(nn.Linear(features, classes, bias=self.bias())), (*lead, classes))


@st.composite
def cases(draw: Draw, *, masked: bool = False) -> Case:
    """A network with its data.

    Args:
        masked: sequences with a term per position, some of which a mask takes away.
    """
    torch.manual_seed(draw(st.integers(0, 3)))
    image = not masked and draw(st.booleans())
    builder = Builder(draw, image, masked)
    tokens = not image and draw(st.sampled_from([False, False, True]))
    if masked:
        builder.shape = builder.start = draw(st.sampled_from([(3, 3), (4, 2), (2, 4)]))
    if tokens:
        features = draw(st.sampled_from([2, 4]))
        time = builder.shape[:-1]
        kind = draw(st.sampled_from([P.Piece, P.Flat])) if time else P.Piece
        builder.start = time
        builder.add(kind(nn.Embedding(VOCABULARY, features), builder.after()), (*time, features))
    for _ in range(draw(st.integers(1, 5))):
        builder.step()
    likelihood = "categorical" if masked else draw(st.sampled_from(["categorical", "categorical", "bernoulli", "gaussian"]))
    builder.head(likelihood)
    model = nn.Sequential(*builder.pieces).double()
    for module in model.modules():  # scale and shift at their start would hide one another
        if "Norm" in type(module).__name__:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            if getattr(module, "bias", None) is not None:
                nn.init.normal_(module.bias)
    parameters = list(model.parameters())
    if len(parameters) > 2 and draw(st.sampled_from([False, False, False, True])):
        draw(st.sampled_from(parameters)).requires_grad_(False)
    batches = draw(st.sampled_from([[3], [4], [3, 2]]))
    inputs = [
        torch.randint(VOCABULARY, (batch, *builder.start)) if tokens else torch.randn(batch, *builder.start).double()
        for batch in batches
    ]
    masks = None
    if masked:
        masks = [(torch.rand(batch, builder.shape[0]) < 0.5) for batch in batches]
        for mask in masks:
            mask[0, 0], mask[0, -1] = False, True
    apart = [(name, piece) for name, piece in model.named_children() if piece.unaligned]
    unaligned = {f"{name}.{inner}" for name, piece in apart for inner, _ in piece.named_modules() if inner}
    mixes = any(piece.mixes for piece in model)
    return Case(model, inputs, likelihood, draw(st.sampled_from([1.0, 0.5])), masks, mixes, unaligned)
