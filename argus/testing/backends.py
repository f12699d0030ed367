"""The contract of a backend: the CPU backend's answers, from any other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from argus.attention import Query
from argus.backends.base import Affine, Axis, Backend, Dense, ExactRows, Float8, Payload, Segment
from argus.backends.cpu import CpuBackend
from argus.testing.base import Contract, normal, same
from argus.testing.tiers import maker
from argus.tiers.base import ROLES, Tier
from argus.tiers.fp8 import Fp8
from argus.tiers.fp16 import Fp16
from argus.tiers.int4 import Int4
from argus.tiers.int8 import Int8
from argus.tiers.integer import Int3
from argus.tiers.jl import Jl
from argus.tiers.sign import Sign

SHAPES = ((1, 1, 1, 8, 16), (3, 2, 5, 16, 24))
"""Pages ``[n, B, H, P, D]``: one of each, and odd counts."""
TOLERANCE = 2e-3
"""Relative error of attention against the oracle: kernels may multiply in 16 bits."""


def check_backend(backend: Backend, *, device: torch.device | str = "cpu") -> None:
    """Check that a backend keeps its contract.

    Codes within half a step of the source for scales that all differ, 1 to 8 bits, both axes, several groups; packing exact;
    FP8 torch's own cast; signs about the mean the CPU backend's; projection a matrix product; recoding what decoding and
    encoding make; attention over pages, outliers and exact tokens equal to the CPU backend's; and no global random state
    touched.

    Parameters
    ----------
    backend : Backend
    device : torch.device or str
        Where its tensors live.

    Raises
    ------
    ContractError
        If the contract is broken.
    """
    contract = Contract(f"backend {backend.name}")
    with contract.at("all operations").keeps_random_state():
        for shape in SHAPES:
            x = (normal(shape) * torch.logspace(-2, 2, shape[-1]) + normal((shape[-2], 1), 1)).to(device)
            for axis in get_args(Axis):
                for group in (None, 4, 8):
                    check_float8(contract, backend, x, Float8(axis, group))
                    for bits in range(1, 9):
                        check_affine(contract, backend, x, Affine(bits, axis, group))
                    check_affine(contract, backend, x, Affine(8, axis, group, symmetric=True))
                    check_centred(contract, backend, x, Affine(1, axis, group, centred=True))
            check_project(contract, backend, x)
            check_recode(contract, backend, x)
        for query_tokens, start in ((1, 60), (3, 60), (5, 20)):
            check_attend(contract, backend, torch.device(device), query_tokens, start)


def scale_shape(x: Tensor, form: Affine | Float8) -> list[int]:
    """The shape of scales for pages `x`."""
    shape = list(x.shape)
    dim = -2 if form.axis == "channel" else -1
    shape[dim] //= form.group or shape[dim]
    return shape


def spread(scale: Tensor, x: Tensor, form: Affine | Float8) -> Tensor:
    """A number a group as a number a value."""
    dim = -2 if form.axis == "channel" else -1
    return scale.float().repeat_interleave(form.group or x.shape[dim], dim)


def require_scales(words: Contract, payload: Payload, names: set[str], x: Tensor, form: Affine | Float8) -> None:
    """The payload holds `names`, its scales float16 and one a group."""
    words.require(set(payload) == names, f"payload holds {sorted(payload)}, not {sorted(names)}")
    for name in names - {"codes"}:
        words.require(payload[name].dtype == torch.float16, f"{name} is {payload[name].dtype}, not torch.float16")
        found, wanted = list(payload[name].shape), scale_shape(x, form)
        words.require(found == wanted, f"{name} is {found}, not {wanted}")


def check_affine(contract: Contract, backend: Backend, x: Tensor, form: Affine) -> None:
    """Quantized numbers are within half a step of their source; codes that a tier chose come back as they were."""
    words = contract.at(f"pages {list(x.shape)}, {form}")
    payload = backend.quantize(x, form)
    names = {"codes", "scale"} if form.symmetric else {"codes", "scale", "zero"}
    require_scales(words, payload, names, x, form)
    held = payload["codes"].numel() * payload["codes"].element_size() * 8
    words.require(held == x.numel() * form.bits, f"codes take {held} bits, not {x.numel() * form.bits}")
    found = backend.dequantize(payload, form)
    words.require(found.shape == x.shape and found.dtype == torch.float32, f"dequantizes to {list(found.shape)} {found.dtype}")
    steps = ((found - x).abs() / spread(payload["scale"], x, form)).amax()
    words.require(float(steps) <= 0.5 + 2e-3, f"a number is {float(steps):.4g} steps from its source, allowed half a step")
    if form.symmetric:
        return
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 1 << form.bits, x.shape, generator=generator, dtype=torch.uint8).to(x.device)
    packed = backend.affine(codes, payload["scale"], payload["zero"], form)
    wanted = codes.float() * spread(payload["scale"], x, form) + spread(payload["zero"], x, form)
    off = float(((backend.dequantize(packed, form) - wanted).abs() / wanted.abs().amax()).amax())
    words.require(off <= 1e-6, f"codes that a tier chose come back {off:.4g} of the largest number away")


def check_centred(contract: Contract, backend: Backend, x: Tensor, form: Affine) -> None:
    """One bit about the mean: the CPU backend's codes and scales, since both sum in float64."""
    words = contract.at(f"pages {list(x.shape)}, {form}")
    payload = backend.quantize(x, form)
    require_scales(words, payload, {"codes", "scale", "zero"}, x, form)
    oracle = CpuBackend()
    found = backend.dequantize(payload, form).cpu()
    wanted = oracle.dequantize(oracle.quantize(x.cpu(), form), form)
    other = int((found != wanted).sum())
    words.require(other == 0, f"{other} of {x.numel()} numbers are read otherwise than the CPU backend's")


def check_recode(contract: Contract, backend: Backend, x: Tensor) -> None:
    """Pages encoded from another tier's codes are those that are decoded between, and the codes are left alone."""
    tiers = [tier_on(kind, backend) for kind in (Fp16, Fp8, Int8, Int4, Int3, Sign, Jl)]
    for source in tiers:
        for role in ROLES:
            held = source.encode(x, role)
            before = {name: tensor.clone() for name, tensor in held.items()}
            decoded = source.decode(held, role)
            for target in tiers:
                pair = f"{type(source).__name__.lower()} to {type(target).__name__.lower()}"
                words = contract.at(f"pages {list(x.shape)}, {role}, {pair}")
                found = backend.recode(source, target, held, role)
                wanted = target.encode(decoded.clone(), role)
                words.require(found.keys() == wanted.keys(), f"payload holds {sorted(found)}, not {sorted(wanted)}")
                for name, tensor in wanted.items():
                    words.require(same(found[name], tensor), f"'{name}' is not what decoding and encoding make")
                    words.require(same(held[name], before[name]) if name in held else True, f"recoding changes '{name}'")


def check_float8(contract: Contract, backend: Backend, x: Tensor, form: Float8) -> None:
    """FP8 codes are torch's own cast of the scaled numbers."""
    words = contract.at(f"pages {list(x.shape)}, {form}")
    payload = backend.to_fp8(x, form)
    require_scales(words, payload, {"codes", "scale"}, x, form)
    words.require(payload["codes"].dtype == torch.float8_e4m3fn, f"codes are {payload['codes'].dtype}")
    scale = spread(payload["scale"], x, form)
    cast = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    other = int((payload["codes"].float() != cast.float()).sum())
    words.require(other == 0, f"{other} of {x.numel()} codes differ from torch's cast of x / scale")
    off = float(((backend.from_fp8(payload, form) - cast.float() * scale).abs() / x.abs().amax()).amax())
    words.require(off <= 1e-6, f"codes are read {off:.4g} of the largest number away")


def check_project(contract: Contract, backend: Backend, x: Tensor) -> None:
    """Projection is the product of the matrix with the token axis."""
    matrix = normal((3, x.shape[-2]), 3).to(x.device)
    wanted = torch.einsum("mp,nbhpd->nbhmd", matrix.double(), x.double())
    found = backend.project(x, matrix)
    words = contract.at(f"pages {list(x.shape)}, project")
    words.require(found.shape == wanted.shape, f"gives {list(found.shape)}, not {list(wanted.shape)}")
    off = float((found - wanted).norm() / wanted.norm())
    words.require(off <= TOLERANCE, f"relative error {off:.4g}, allowed {TOLERANCE}")


def check_attend(contract: Contract, backend: Backend, device: torch.device, length: int, start: int) -> None:
    """Attention over pages and exact tokens is the CPU backend's."""
    n, batch, heads, page, dim, groups = 3, 2, 3, 16, 16, 2
    x = [normal((n, batch, heads, page, dim), seed).to(device) for seed in (4, 5)]
    tokens = [normal((batch, heads, 16, dim), seed).to(device) for seed in (6, 7)]
    dense = Dense(tokens[0], tokens[1], n * page, n * page + 15)
    wide = [torch.nn.functional.pad(x, (0, 0, 0, 5), value=float("nan")) for x in tokens]
    count = torch.tensor([16, n * page], dtype=torch.int32, device=device)
    roomy = replace(dense, keys=wide[0], values=wide[1], start=0, count=count)
    q = normal((batch, heads * groups, length, dim), 8).to(device)
    exact = normal((n, batch, heads, page), 9).to(device) > 1
    sinks = normal((heads * groups,), 10).to(device)
    chosen = normal((n, batch, heads, page, dim), 11).to(device) > 2
    outliers = {role: ExactRows.of(one + 4, chosen, torch.float16) for role, one in zip(ROLES, x, strict=True)}
    padding = torch.ones(batch, 1, length, n * page + 16, dtype=torch.bool, device=device)
    padding[:, :, :, :5] = False
    for kind in (Int8, Int4, Int3):
        ours, oracle = (tier_on(kind, made) for made in (backend, CpuBackend()))
        keys, values = ours.encode(x[0], "keys"), ours.encode(x[1], "values")
        read = ours.decode(keys, "keys"), ours.decode(values, "values")
        wanted_keys, wanted_values = oracle.encode(read[0], "keys"), oracle.encode(read[1], "values")
        positions = torch.arange(n, device=device) * page
        segment = Segment(ours, ours, keys, values, positions, n * page - 1, page)
        plain = Segment(oracle, oracle, wanted_keys, wanted_values, positions, n * page - 1, page)
        circumstances: tuple[tuple[str, Tensor | None, dict[str, Any], Tensor | None, Dense], ...] = (
            ("causal", None, {}, None, dense),
            ("a mask", padding, {}, None, dense),
            ("kept tokens, sinks", None, {"exact": exact}, sinks, dense),
            ("outliers", None, {"exact": exact, "outliers": outliers}, None, dense),
            ("tokens counted on the device", None, {}, None, roomy),
            ("a mask, tokens counted on the device", padding, {}, None, roomy),
        )
        for name, mask, kept, learned, window in circumstances:
            for softcap in (None, 5.0):
                query = Query.of(q, heads, dim**-0.5, start, mask, softcap)
                found = backend.attend(query, [replace(segment, **kept)], [window], learned)
                wanted = CpuBackend().attend(query, [replace(plain, **kept)], [dense], learned)
                case = f"attention over {kind.__name__.lower()}, {length} queries from {start}, {name}, softcap {softcap}"
                words = contract.at(case)
                words.require(found.shape == wanted.shape, f"gives {list(found.shape)}, not {list(wanted.shape)}")
                off = float((found - wanted).norm() / wanted.norm())
                words.require(off <= TOLERANCE, f"relative error {off:.4g} against the CPU backend, allowed {TOLERANCE}")


def tier_on(kind: type[Tier], backend: Backend) -> Tier:
    """A built-in tier on a backend."""
    return maker(kind, {}, backend, {"fp16": Fp16})(torch.float16)
