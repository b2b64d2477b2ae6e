"""Makes a span's modules quicker without changing what they compute: joined and packed weights,
fused norms.

On a CPU, oneDNN multiplies with weights in a blocked layout of its own up to four times as fast as
the plain product does when there are a few rows (tried: 1,024 x 1,024 in float32, 4 rows: 289 us
and 94). The plain copy of the weights goes, so that no more memory is needed. Products of the same
tensor (queries, keys and values, say) become one, which saves calls, and packs better.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

jit: Any = torch.jit  # which does not say what it exports

# Below so many weights the plain product is as fast, or faster for a single row: 768 x 256 takes 23
# us against 31 packed, but 91 against 50 with 8 rows.
_WORTHWHILE = {torch.float32: 1 << 17, torch.bfloat16: 1 << 16}
_ROWS = 16  # for which the layout is chosen; it hardly matters
# So many rows a single one is made into for large weights: there the kernel for one is slower than
# that for four (2,816 x 1,024: 980 us and 850). A span of model B: 14.8 ms instead of 16 to 18.
_FEW, _LARGE = 4, 1 << 19
_ALIKE = 1e-6  # between a fused norm and the model's own, relative


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


@torch.library.custom_op("swarm::multiply", mutates_args=())
def _opaque(x: Tensor, packed: Tensor, bias: Tensor | None, size: int) -> Tensor:
    """The same for torch.compile, whose own lowering takes constant weights only."""
    return _multiply(x, packed, bias)


@_opaque.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None, size: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], size)


_SCRIPT = f"""
def multiply(x, packed, bias: Optional[Tensor], size: int, large: bool):
    none: List[Optional[number]] = []
    if x.numel() > size or not large:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", none, "")
    few = x.reshape(1, -1).repeat({_FEW}, 1)
    few = torch.ops.mkldnn._linear_pointwise(few, packed, bias, "none", none, "")
    return few[:1].view(x.size(0), x.size(1), -1)
"""


@functools.cache
def _script() -> Any:
    """`PackedLinear.forward` for torch's tracer, which cannot record a call with a list of numbers
    and would record one of both branches only."""
    return jit.CompilationUnit(_SCRIPT)


class _Multiplication(torch.autograd.Function):
    """For gradients of `x`, which oneDNN's own product does not know of; weights are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return layer(x)  # where nothing is recorded

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] @ ctx.layer.weight, None


class PackedLinear(nn.Module):
    """An `nn.Linear` on the CPU whose weights lie as oneDNN likes them."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.bias = plain.bias
        self._large = plain.weight.numel() >= _LARGE
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(plain.weight.data, _ROWS)

    @property
    def weight(self) -> Tensor:
        """A plain copy, for code that looks at it."""
        return self.packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return cast(Tensor, _Multiplication.apply(x, self))
        if torch.compiler.is_compiling():
            return _opaque(x, self.packed, self.bias, self.out_features)
        if jit.is_tracing():
            return _script().multiply(x, self.packed, self.bias, self.in_features, self._large)
        if x.numel() > self.in_features or not self._large:
            return _multiply(x, self.packed, self.bias)
        few = x.reshape(1, -1).repeat(_FEW, 1)
        return _multiply(few, self.packed, self.bias)[:1].view(*x.shape[:-1], -1)


class JoinedLinear(nn.Module):
    """One of several `nn.Linear`s that are given the same tensor, one after the other: whoever is
    asked first multiplies for all of them."""

    def __init__(self, joint: _Joint, index: int) -> None:
        super().__init__()
        self._joint = joint
        self._index = index
        self.in_features, self.out_features = joint.product.in_features, joint.sizes[index]
        if index == 0:
            self.product = joint.product  # so that its weights are somebody's

    @property
    def weight(self) -> Tensor:
        return self._joint.product.weight.split(self._joint.sizes)[self._index]

    @property
    def bias(self) -> Tensor | None:
        bias = self._joint.product.bias
        return None if bias is None else bias.split(self._joint.sizes)[self._index]

    def forward(self, x: Tensor) -> Tensor:
        return self._joint.part(x, self._index)


class _Joint:
    def __init__(self, plains: Sequence[nn.Linear]) -> None:
        self.sizes = [plain.out_features for plain in plains]
        product = _linear([plain.weight for plain in plains], [_bias(plain) for plain in plains])
        self.product: Any = _packed(product) or product
        self._last = len(plains) - 1
        self._given: Tensor | None = None
        self._parts: Sequence[Tensor] = ()

    def part(self, x: Tensor, index: int) -> Tensor:
        if x is not self._given:
            self._given, self._parts = x, self.product(x).split(self.sizes, -1)
        part = self._parts[index]
        if index == self._last:
            self._given, self._parts = None, ()
        return part


def _bias(linear: Any) -> Tensor | None:
    return linear.bias


def _linear(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> nn.Linear:
    """One with copies of all these rows."""
    rows = torch.cat(list(weights))
    linear = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(rows, requires_grad=False)
    if given := [bias for bias in biases if bias is not None]:
        linear.bias = nn.Parameter(torch.cat(given), requires_grad=False)
    return linear


class FusedNorm(nn.Module):
    """Root-mean-square normalisation in one call instead of six."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


@torch.no_grad()
def quicken(root: nn.Module, probe: Callable[[], Tensor] | None = None) -> None:
    """Replace what can be replaced below `root`, in place. `probe` runs it once, and shows which
    products are of the same tensor; what does not give its numbers again is not joined."""
    for owner, name in _places(root):
        if (fused := _fused(owner.get_submodule(name))) is not None:
            setattr(owner, name, fused)
    if probe is not None:
        _join(root, probe)
    for owner, name in _places(root):
        child = owner.get_submodule(name)
        if type(child) is nn.Linear and (packed := _packed(child)) is not None:
            setattr(owner, name, packed)


def packed_weights(roots: Iterable[nn.Module]) -> list[Tensor]:
    """Of all products below `roots`, in oneDNN's layouts."""
    modules = (module for root in roots for module in root.modules())
    return [module.packed for module in modules if isinstance(module, PackedLinear)]


def _owners(root: nn.Module) -> list[nn.Module]:
    """Modules that are made of others. No list may hold those that have the weights: they must be
    let go one by one, or for a moment there would be all of them twice."""
    made = [module for module in root.modules() if any(True for _ in module.children())]
    return [module for module in made if not isinstance(module, JoinedLinear)]


def _places(root: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(owner, name) for owner in _owners(root) for name, _ in owner.named_children()]


def _join(root: nn.Module, probe: Callable[[], Tensor]) -> None:
    given: dict[nn.Module, list[Tensor]] = {}  # in the order of the calls
    with ExitStack() as hooks:
        for child in root.modules():
            if type(child) is nn.Linear:

                def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                    given.setdefault(module, []).extend(inputs)

                hooks.callback(child.register_forward_pre_hook(note).remove)
        expected = probe()
    for owner in _owners(root):
        names = {child: name for name, child in owner.named_children()}
        groups: dict[tuple[int, bool], list[nn.Linear]] = {}
        for module, tensors in given.items():
            if module in names and len(tensors) == 1:
                plain = cast(nn.Linear, module)
                groups.setdefault((id(tensors[0]), _bias(plain) is not None), []).append(plain)
        for group in groups.values():
            if len(group) > 1:
                joint = _Joint(group)
                for index, plain in enumerate(group):
                    setattr(owner, names[plain], JoinedLinear(joint, index))
                    del given[plain]
    if not _gives(probe, expected):
        _part(root)


def _gives(probe: Callable[[], Tensor], expected: Tensor) -> bool:
    try:
        difference = (probe() - expected).abs().max()
    except RuntimeError:  # a view of what is not in one piece any more
        return False
    return bool(difference <= torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max())


def _part(root: nn.Module) -> None:
    """Undo all joints."""
    for owner, name in _places(root):
        child = owner.get_submodule(name)
        if isinstance(child, JoinedLinear):
            setattr(owner, name, _linear([child.weight], [child.bias]))


def _packed(plain: nn.Linear) -> nn.Module | None:
    weight = plain.weight
    fits = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if not fits or weight.numel() < _WORTHWHILE.get(weight.dtype, weight.numel() + 1):
        return None
    return PackedLinear(plain)


def _fused(norm: nn.Module) -> nn.Module | None:
    """None unless it is a plain RMS norm, which is seen by what it computes."""
    found: Any = norm
    eps = getattr(found, "variance_epsilon", getattr(found, "eps", None))
    parameters = dict(norm.named_parameters())
    if not isinstance(eps, float) or list(parameters) != ["weight"] or found.weight.ndim != 1:
        return None
    if len(inspect.signature(norm.forward).parameters) != 1:  # some have gates
        return None
    weight = cast(Tensor, found.weight)
    fused = FusedNorm(weight, eps)
    scale = torch.tensor([1e-3, 1.0, 1e3], dtype=weight.dtype, device=weight.device)
    x = torch.linspace(-1, 2, weight.numel(), dtype=weight.dtype, device=weight.device)
    x = torch.outer(scale, x)[None]
    expected, got = norm(x), fused(x)
    alike = expected.shape == got.shape and expected.dtype == got.dtype
    if alike and torch.allclose(expected, got, rtol=_ALIKE, atol=0):
        return fused
    return None
