"""HeatKV's stand-ins for the two methods of one self-attention of another repository's model.

Shapes: R rows (images, doubled by guidance), N tokens of the running scale, C width, H heads, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from heatkv.attachment.discover import NORM_FLAGS
from heatkv.core.schedule import ScaleSchedule
from heatkv.engine.attention.rotary import rotate, rotation_of
from heatkv.errors import ModelError, PlanError

if TYPE_CHECKING:
    from heatkv.attachment.attached import Attached

_KNOWN_ARGUMENTS = ("scale_schedule", "rope2d_freqs_grid", "scale_ind")


class Layer:
    """One self-attention of the model. Its own `forward` and `kv_caching` come back when `undo` closes."""

    def __init__(self, attached: Attached, index: int, where: str, module: Any) -> None:
        self.attached, self.index, self.where, self.module = attached, index, where, module
        self.caching = False
        self._signature = inspect.signature(module.forward)
        self._x = next(iter(self._signature.parameters))
        self.brings_schedule = "scale_schedule" in self._signature.parameters

    def put_on(self, undo: ExitStack) -> None:
        """Replace the two methods. Raises ModelError where they are replaced already."""
        own = vars(self.module)  # a method of the class is hidden by an entry here, and seen again without it
        if isinstance(getattr(own.get("forward"), "__self__", None), Layer):
            raise ModelError(f"{self.where} is attached already; leave the other `with` block first")
        self._module_kv_caching = self.module.kv_caching
        self.caching = False
        for name in ("forward", "kv_caching"):
            if name in own:
                undo.callback(own.__setitem__, name, own[name])
            else:
                undo.callback(own.pop, name, None)
            own[name] = getattr(self, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModelError(f"{self.where} is attached; copy or save the model outside of the `with` block")

    def kv_caching(self, enable: bool) -> None:
        """Start (True) or end (False) an image, for the module as well: its own cache is emptied and stays so."""
        self._module_kv_caching(enable)
        self.caching = bool(enable)
        if enable:
            self.attached.begin()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        arguments = self._signature.bind(*args, **kwargs).arguments
        self._check(arguments)
        x_RNC: Tensor = arguments[self._x]
        q, k, v = self._qkv(x_RNC, self._rotation(x_RNC, arguments))
        if v.requires_grad and torch.is_grad_enabled():
            raise ModelError("an attached model only draws; call it under torch.no_grad() or torch.inference_mode()")
        out_RHND = self.attached.attend(self.index, x_RNC, q, k, v)
        out: Tensor = self.module.proj_drop(self.module.proj(out_RHND.transpose(1, 2).flatten(2)))
        return out

    def _check(self, arguments: Mapping[str, Any]) -> None:
        """Raise unless HeatKV can do what is asked for, and this call is due."""
        if not self.caching:
            raise ModelError(
                f"{self.where} runs without kv_caching(True); the model must switch it on, inside the `with` block, "
                "before the first scale"
            )
        if self.module.training:
            raise ModelError(f"{self.where} is in training mode; HeatKV only draws: call model.eval() first")
        for name, value in arguments.items():
            default = self._signature.parameters[name].default
            if name not in (self._x, *_KNOWN_ARGUMENTS) and value is not None and value is not default:
                raise ModelError(
                    f"{self.where} was given {name}, which HeatKV cannot take: it only draws, without masks"
                )
        turn, x_RNC = self.attached.turn, arguments[self._x]
        turn.check(self.index, x_RNC.shape[0], x_RNC.shape[1])
        if not self.brings_schedule:
            return
        scale = arguments.get("scale_ind")
        if arguments.get("scale_schedule") is None or scale is None:
            raise ModelError(
                f"{self.where} was called without scale_ind or scale_schedule. Infinity's blocks leave them out when "
                "fused_norm is off, and then rotate every scale like the first one; build the model with fused_norm on"
            )
        runs, planned = ScaleSchedule.of(arguments["scale_schedule"]), turn.geometry.schedule
        if runs != planned or scale != turn.target:
            raise PlanError(
                f"the model runs scale {scale} of {runs}, the plan is for {planned} and scale {turn.target} is due"
            )

    def _qkv(self, x_RNC: Tensor, rotation_2NP: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(R, H, N, D) each: queries for a softmax of scale 1, keys as they are cached, and values, in one type."""
        module, weight = self.module, self.module.mat_qkv.weight
        bias = torch.cat([module.q_bias, module.zero_k_bias, module.v_bias]).to(weight.dtype)
        qkv = F.linear(x_RNC, weight, bias).unflatten(-1, (3, module.num_heads, module.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if any(getattr(module, flag, False) for flag in NORM_FLAGS):
            # (1, H, 1, 1), or (1, 1, H, 1) in models made for a flash kernel; clamped in their own type, as there
            log_scale = module.scale_mul_1H11.clamp(max=float(module.max_scale_mul)).float().view(1, -1, 1, 1)
            q = F.normalize(q.float(), dim=-1) * log_scale.exp()
            k = F.normalize(k.float(), dim=-1)
        if rotation_2NP is not None:
            q, k = rotate(q.float(), rotation_2NP), rotate(k.float(), rotation_2NP)
        return (q * module.scale).to(v.dtype), k.to(v.dtype), v

    def _rotation(self, x_RNC: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
        """(2, N, D/2): cos and sin of the running scale, from a table (2, 1, 1, 1, tokens of all scales, D/2)."""
        tables = arguments.get("rope2d_freqs_grid")
        if tables is None:
            return None
        turn, table = self.attached.turn, tables[str(tuple(arguments["scale_schedule"]))]
        tokens = turn.geometry.schedule.slice(turn.target)
        rotation_2NP: Tensor = table[:, 0, 0, 0, tokens].to(x_RNC.device, torch.float32)
        angles = self.attached.pooled_angles
        if angles is not None:
            known = rotation_of(angles[turn.target]).to(x_RNC.device)
            if not torch.allclose(rotation_2NP, known, atol=0.02):  # room for a table in 16 bits
                raise ModelError(
                    "the rotary table is not that of the published Infinity models, so that keys cannot be pooled; "
                    "attach a plan without coarse levels"
                )
        return rotation_2NP
