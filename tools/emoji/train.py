"""Trains the embedded model from nothing but the npm package: `python -m tools.emoji.train --help`.

Three stages, each resumable from its own checkpoint: the VQVAE, the transformer, and the judge (a classifier of
real training images that names the samples). `export` writes the fp16 weights that ship.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from heatkv.core.io import replacing, write_text
from heatkv.core.schedule import ScaleSchedule
from heatkv.engine.arena_cache import Attend
from heatkv.generation.batches import generate
from heatkv.generation.images import image_grid
from heatkv.models.emoji import CLASSES, VAR_CONFIG, VQVAE_CONFIG, WEIGHTS, load
from heatkv.models.var import VAR, Condition
from tools.emoji.autoencoder import VQAutoencoder
from tools.emoji.data import EmojiImages

app = typer.Typer(add_completion=False, help=__doc__)
Images = Annotated[Path, typer.Option("--images", help="folder of the unpacked npm package emoji-datasource-google")]
Work = Annotated[Path, typer.Option("--work", help="folder of the checkpoints")]

CLASS_DROP = 0.1
MAX_REPLACED = 0.25
EMA_DECAY = 0.999
LEAST_LOG_SCALE, MOST_LOG_SCALE = math.log(3.0), math.log(24.0)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint beside its final name, then move it there, so that a killed run leaves a whole one."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def rate(step: int, steps: int, warmup: int, decay: float) -> float:
    """Warm up, hold, then fall linearly to zero over the last share `decay` of the run."""
    left = (steps - step) / max(steps * decay, 1)
    return min((step + 1) / warmup, left, 1.0)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its own."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("base_lr", group["lr"]) * factor


# ---------------------------------------------------------------------------------------------- VQVAE


def quantize(model: VQAutoencoder, f_BZPP: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Straight-through f_hat, the codebook and commitment loss, and the codes."""
    tokens = model.codes(f_BZPP.detach())
    total = torch.zeros_like(f_BZPP)
    loss = f_BZPP.new_zeros(())
    for scale, tokens_BN in enumerate(tokens):
        total = total + model.quantize.code_features(tokens_BN, scale)
        loss = loss + F.mse_loss(total.detach(), f_BZPP) * 0.25 + F.mse_loss(total, f_BZPP.detach())
    return f_BZPP + (total - f_BZPP).detach(), loss / len(tokens), tokens


@app.command()
def vqvae(images: Images, work: Work, steps: int = 2000, batch: int = 16, seed: int = 1) -> None:
    """Train the VQVAE (about a quarter of an hour on two cores)."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "vqvae.pt"
    torch.manual_seed(seed)
    data = EmojiImages(images)
    model = VQAutoencoder(VQVAE_CONFIG).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    nn.init.normal_(model.quantize.embedding.weight, std=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    usage = torch.zeros(VQVAE_CONFIG.vocab_size)
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        usage, start = state["usage"], state["step"]
    began, seen = time.time(), 0
    for step in range(start, steps):
        labels = torch.randint(len(CLASSES), (batch,), generator=generator)
        x = data.draw(labels, generator).contiguous(memory_format=torch.channels_last)
        f = model.latent(x)
        straight, codes_loss, tokens = quantize(model, f)
        raw = model.decoder(model.post_quant_conv(straight))
        edges = sum((F.l1_loss(raw.diff(dim=d), x.diff(dim=d)) for d in (2, 3)), start=raw.new_zeros(()))
        loss = F.mse_loss(raw, x) * 2 + F.l1_loss(raw, x) * 0.5 + edges + codes_loss * 0.5
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_rate(optimizer, rate(step, steps, 50, 0.5))
        optimizer.step()
        flat = torch.cat([t.flatten() for t in tokens])
        usage = usage * 0.98 + torch.bincount(flat, minlength=len(usage)).float() * 0.02
        if step < steps * 0.6 and step % 20 == 0 and (dead := (usage < 0.5).nonzero().flatten()).numel():
            with torch.no_grad():  # a code nobody uses starts again at a latent that was badly served
                rest = (f - straight).detach() if step % 40 else f.detach()
                pool = rest.permute(0, 2, 3, 1).reshape(-1, rest.shape[1])
                pick = torch.randint(len(pool), (len(dead),), generator=generator)
                model.quantize.embedding.weight[dead] = pool[pick]
            usage[dead] = 2.0
        seen += batch
        if step % 50 == 0 or step == steps - 1:
            psnr = -10 * math.log10(float(F.mse_loss(raw.detach().clamp(-1, 1), x)) / 4)
            used = int((usage > 0.05).sum())
            speed = seen / (time.time() - began)
            print(f"vqvae {step} loss {loss.item():.4f} psnr {psnr:.2f} codes {used} {speed:.1f} img/s", flush=True)
        if step % 200 == 199 or step == steps - 1:
            save(
                path,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                    "usage": usage,
                    "step": step + 1,
                },
            )


# ---------------------------------------------------------------------------------------- transformer


class TeacherForcing(Attend):
    """`attend` for a whole sequence at once: a token sees every token of its own and of coarser scales."""

    def __init__(self, schedule: ScaleSchedule) -> None:
        scale_L = torch.repeat_interleave(torch.arange(len(schedule)), torch.tensor(schedule.tokens))
        self.mask_LL = scale_L[:, None] >= scale_L[None, :]

    def attend(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q_RHND, k_RHND, v_RHND, attn_mask=self.mask_LL, scale=1.0)


def initialise(model: VAR) -> None:
    """Depth-scaled projections, gates near one, and heads that start at different temperatures so that they part."""
    config = model.config
    for block in model.layers():
        for linear in (block.attn.mat_qkv, block.ffn.fc1):
            nn.init.trunc_normal_(linear.weight, std=config.width**-0.5 * 0.8)
        for linear in (block.attn.proj, block.ffn.fc2):
            nn.init.trunc_normal_(linear.weight, std=linear.in_features**-0.5 * 0.8 / math.sqrt(2 * config.depth))
        spread = torch.linspace(LEAST_LOG_SCALE, MOST_LOG_SCALE, config.heads)
        block.attn.scale_mul_1H11.data.copy_(spread.view(1, -1, 1, 1))
        nn.init.normal_(block.ada_gss, std=0.02)
        block.ada_gss.data[:, :, :2] += 1
    for adaln in (model.shared_ada_lin[1], model.head_nm.ada_lin[1]):
        assert isinstance(adaln, nn.Linear)
        nn.init.normal_(adaln.weight, std=1e-3)
        nn.init.zeros_(adaln.bias)
    nn.init.normal_(model.class_emb.weight, std=0.5)
    nn.init.normal_(model.lvl_embed.weight, std=0.5)
    nn.init.normal_(model.pos_1LC, std=0.3)
    nn.init.normal_(model.word_embed.weight, std=0.5)
    nn.init.normal_(model.head.weight, std=0.01)
    nn.init.zeros_(model.head.bias)


@torch.no_grad()
def teacher_inputs(model: VQAutoencoder, f_BZPP: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Input maps (B, L - 1, Z) and target codes (B, L), with some codes replaced at random on the way.

    What a scale should code is taken against what was really used before, so the model learns to mend mistakes.
    """
    batch, sides = f_BZPP.shape[0], model.config.patch_sides
    share = torch.rand(batch, 1, generator=generator) * MAX_REPLACED
    share = share * (torch.rand(batch, 1, generator=generator) < 0.8)
    f_hat = torch.zeros_like(f_BZPP)
    maps, targets = [], []
    for scale, side in enumerate(sides):
        rest = f_BZPP - f_hat
        z = rest if scale == len(sides) - 1 else F.interpolate(rest, size=(side, side), mode="area")
        best = model.nearest(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])).view(batch, -1)
        targets.append(best)
        wrong = torch.rand(best.shape, generator=generator) < share
        noise = torch.randint(model.config.vocab_size, best.shape, generator=generator)
        f_hat = f_hat + model.quantize.code_features(torch.where(wrong, noise, best), scale)
        if scale + 1 < len(sides):
            maps.append(model.quantize.next_map(f_hat, scale + 1).flatten(2).transpose(1, 2))
    return torch.cat(maps, 1), torch.cat(targets, 1)


def forced_logits(model: VAR, labels_B: Tensor, maps_BLZ: Tensor, mask: TeacherForcing) -> Tensor:
    """Logits of all scales, (B, L, V), in one masked pass over the input maps of scales 1 and later."""
    condition: Condition = model.condition(labels_B)
    first = model.schedule.tokens[0]
    x = torch.cat([condition.class_RC[:, None].expand(-1, first, -1) + model.pos_start, model.word_embed(maps_BLZ)], 1)
    positions = torch.cat([model.positions(scale) for scale in range(len(model.schedule))], 1)
    logits: Tensor = model(x + positions, condition, mask)
    return logits


def split_parameters(model: VAR) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The blocks' matrices, for Muon, and everything else, for AdamW."""
    matrices = [p for block in model.blocks for name, p in block.named_parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in model.parameters() if id(p) not in chosen]


@app.command()
def transformer(
    images: Images,
    work: Work,
    steps: int = 1650,
    batch: int = 16,
    seed: int = 2,
    minutes: Annotated[float, typer.Option(help="stop (resumable) after so long; 0 = run to the last step")] = 0,
) -> None:
    """Train the transformer on the VQVAE's codes. `--steps` may be changed when resuming."""
    path = work / "transformer.pt"
    torch.manual_seed(seed)
    data = EmojiImages(images)
    coder = VQAutoencoder(VQVAE_CONFIG).eval()
    coder.load_state_dict(torch.load(work / "vqvae.pt", weights_only=True)["model"])
    model = VAR(VAR_CONFIG)
    initialise(model)
    average = copy.deepcopy(model).requires_grad_(False)
    matrices, others = split_parameters(model)
    muon = torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.97), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        muon.load_state_dict(state["muon"])
        adamw.load_state_dict(state["adamw"])
        generator.set_state(state["generator"])
        start = state["step"]
    mask = TeacherForcing(model.schedule)
    weight_L = torch.cat(
        [torch.full((n,), 1 / side) for n, side in zip(model.schedule.tokens, VAR_CONFIG.patch_sides, strict=True)]
    )
    weight_L = weight_L / weight_L.sum()
    began, seen, running = time.time(), 0, 0.0
    optimizers: list[torch.optim.Optimizer] = [muon, adamw]
    for step in range(start, steps):
        labels = torch.randint(len(CLASSES), (batch,), generator=generator)
        with torch.no_grad():
            f = coder.latent(data.draw(labels, generator))
        maps, targets = teacher_inputs(coder, f, generator)
        dropped = torch.rand(batch, generator=generator) < CLASS_DROP
        logits = forced_logits(model, torch.where(dropped, len(CLASSES), labels), maps, mask)
        per_token = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(batch, -1)
        loss = (per_token * weight_L).sum(1).mean()
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            set_rate(optimizer, rate(step, steps, 100, 0.4))
            optimizer.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        seen += batch
        running = loss.item() if step == start else running * 0.98 + loss.item() * 0.02
        last = step == steps - 1 or (minutes > 0 and time.time() - began > 60 * minutes)
        if step % 25 == 0 or last:
            print(f"transformer {step} loss {running:.4f} {seen / (time.time() - began):.2f} img/s", flush=True)
        if step % 200 == 199 or last:
            save(
                path,
                {
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "muon": muon.state_dict(),
                    "adamw": adamw.state_dict(),
                    "generator": generator.get_state(),
                    "step": step + 1,
                },
            )
        if last:
            break


# -------------------------------------------------------------------------------- export and judgement


@app.command()
def export(work: Work, out: Annotated[Path, typer.Option(help="file to write")] = WEIGHTS) -> None:
    """Write the averaged transformer and the VQVAE as fp16 safetensors."""
    parts = {
        "transformer.": torch.load(work / "transformer.pt", weights_only=True)["average"],
        "vqvae.": torch.load(work / "vqvae.pt", weights_only=True)["model"],
    }
    tensors = {
        prefix + name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for prefix, state in parts.items()
        for name, tensor in state.items()
    }
    with replacing(out) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


def small_classifier() -> nn.Sequential:
    """The judge: four strided convolutions and an average."""
    sizes = (3, 32, 64, 128, 128)
    layers: list[nn.Module] = []
    for below, above in itertools.pairwise(sizes):
        layers += [nn.Conv2d(below, above, 3, stride=2, padding=1), nn.BatchNorm2d(above), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], len(CLASSES)))


@app.command()
def judge(
    images: Images,
    work: Work,
    weights: Annotated[Path, typer.Option(help="exported weights")] = WEIGHTS,
    per_class: int = 4,
    steps: int = 600,
    seed: int = 7,
) -> None:
    """Train the judge on real images (once), then let it name samples of the full cache; writes a contact sheet."""
    torch.manual_seed(seed)
    data, generator, path = EmojiImages(images), torch.Generator().manual_seed(seed), work / "judge.pt"
    classifier = small_classifier()
    if path.exists():
        classifier.load_state_dict(torch.load(path, weights_only=True))
    else:
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
        for step in range(steps):
            labels = torch.randint(len(CLASSES), (64,), generator=generator)
            loss = F.cross_entropy(classifier(data.draw(labels, generator)), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            set_rate(optimizer, rate(step, steps, 20, 0.5))
            optimizer.step()
        save(path, classifier.state_dict())
    classifier.eval()
    everything = torch.arange(len(CLASSES)).repeat(per_class)
    with torch.inference_mode():
        real = (classifier(data.draw(everything, generator)).argmax(1) == everything).float().mean()
        model = load(weights)
        pictures = data.draw(everything, generator)
        coder = VQAutoencoder(VQVAE_CONFIG).eval()
        whole = load_file(weights).items()
        coder.load_state_dict({name.removeprefix("vqvae."): x for name, x in whole if name.startswith("vqvae.")})
        codes = coder.codes(coder.latent(pictures))
        f_hat = sum(coder.quantize.code_features(tokens, scale) for scale, tokens in enumerate(codes))
        error = F.mse_loss(coder.decode(f_hat), pictures)
        used = len(torch.cat([tokens.flatten() for tokens in codes]).unique())
        print(
            f"reconstruction {-10 * math.log10(float(error) / 4):.2f} dB over {len(pictures)} images, {used} codes used"
        )
        samples = generate(model, everything.tolist(), model.plan(), seed=seed, batch=32)
        right = classifier(samples * 2 - 1).argmax(1) == everything
    wrong = sorted({CLASSES[int(label)] for label in everything[~right]})
    print(f"real images named right {real:.1%}; samples named right {right.float().mean():.1%}")
    print(f"missed: {', '.join(wrong) or 'none'}")
    sheet = samples[: len(CLASSES)]
    with replacing(work / "contact_sheet.png") as temporary:
        image_grid(sheet, columns=8, enlarge=2).save(temporary, format="PNG")
    shuffled = torch.randperm(len(CLASSES), generator=generator)
    with replacing(work / "shuffled_sheet.png") as temporary:
        image_grid(sheet[shuffled], columns=8, enlarge=3).save(temporary, format="PNG")
    write_text(work / "shuffled_labels.txt", "\n".join(CLASSES[int(i)] for i in shuffled) + "\n")


if __name__ == "__main__":
    app()
