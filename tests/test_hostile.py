"""Hostile inputs: a few hundred damaged files and texts for every loader (`make fuzz` has thousands), and each kind of
file that once got past one."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import (
    Broken,
    Target,
    Watch,
    make_targets,
    outcome,
    prepare,
    schedule_of_trials,
    text_targets,
    whole,
)
from mutations import CANARY, hostile_pickles, misplaced, with_bomb, zipped
from PIL import Image

from heatkv.core.checks import regular_array, shown
from heatkv.core.geometry import Budget, CacheGeometry
from heatkv.core.io import MAX_DEPTH, as_path, is_there, parse_json, read_json, resolved, write_json
from heatkv.core.plan import held_for_targets
from heatkv.core.schedule import MAX_SCALES, ScaleSchedule
from heatkv.errors import BudgetError, FormatError, HeatKVError, ModelError, PlanError, ScheduleError
from heatkv.generation.images import read_pixels
from heatkv.models.catalogue import find_weights, load_model
from heatkv.models.checkpoint import build_infinity, build_var, read_checkpoint, var_state
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.text_encoder import T5TextEncoder
from heatkv.profiling.report.old_reading import read_results

IN_SUITE = 300

# the files are made once
pytestmark = pytest.mark.xdist_group("hostile")


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def targets(root: Path, emoji: ClassConditionalModel) -> dict[str, Any]:
    made = [*make_targets(root / "whole", root / CANARY, emoji, None), *text_targets()]
    return {target.name: target for target in made}


# ------------------------------------------------------------------------------------------------ all loaders


def test_every_loader_refuses_or_reads_what_is_damaged(targets: dict[str, Any], root: Path, watch: Watch) -> None:
    told: dict[str, set[str]] = {name: set() for name in targets}
    broken = []
    for target in targets.values():
        whole(target, root / "place")()
    for target, seed in schedule_of_trials(list(targets.values()), IN_SUITE):
        trial = prepare(target, seed, root / "place")
        try:
            told[target.name].add(outcome(trial.load, watch, root / CANARY, trial.inside))
        except Broken as error:
            broken.append(f"{trial.target} {seed}: {trial.told}\n  {error}")
    assert not broken, "\n".join(broken)
    for target in targets.values():  # mutants that a loader never notices, or always alike, would test little
        if isinstance(target, Target) and target.share >= 1:
            assert len(told[target.name]) >= 3, target.name


def test_what_is_no_file_is_refused(targets: dict[str, Any], root: Path, watch: Watch) -> None:
    """Folders, pipes, devices, sockets and links, in the place of every file that is read."""

    class Chosen:
        def __init__(self, kind: int) -> None:
            self.kind = kind

        def randrange(self, count: int) -> int:
            assert count == 8
            return self.kind

    for target in targets.values():
        if not isinstance(target, Target) or target.name == "report":
            continue
        for kind in range(8):
            for name in list(target.mutators)[:3]:
                whole(target, root / "place")
                told = misplaced(root / "place" / name, Chosen(kind))  # type: ignore[arg-type]
                inside = root / "place" if target.writes else None
                found = outcome(lambda: target.load(root / "place"), watch, root / CANARY, inside)  # noqa: B023
                assert found == "whole" or told != "a link to the file", (target.name, name, found)


def test_the_watch_sees_what_it_is_for(watch: Watch, tmp_path: Path) -> None:
    def fails(load: Callable[[], Any]) -> str:
        with pytest.raises(Broken) as raised:
            outcome(load, watch, tmp_path / CANARY)
        return str(raised.value)

    assert "os.mkdir" in fails(lambda: os.mkdir(tmp_path / "made"))
    assert "open" in fails(lambda: (tmp_path / "made.txt").write_text("x"))
    assert "os.rename" in fails(lambda: (tmp_path / "made.txt").rename(tmp_path / "other.txt"))
    assert "os.system" in fails(lambda: os.system("true"))
    assert "find_class" in fails(lambda: pickle.loads(pickle.dumps(Path)))
    assert "builtins.KeyError" in fails(lambda: {}[1])
    assert "ran" in fails(lambda: (tmp_path / CANARY).mkdir() or watch.seen.clear())

    def written(where: Path) -> Iterator[str]:
        yield outcome(lambda: where.write_text("x"), watch, tmp_path / "no canary", tmp_path / "inside")

    (tmp_path / "inside").mkdir()
    assert next(written(tmp_path / "inside" / "x")) == "whole"
    with pytest.raises(Broken, match=r"inside2"):
        next(written(tmp_path / "inside2"))


# ------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 480, 900, 5_000, 200_000])
@pytest.mark.parametrize(("left", "right"), [("[", "]"), ('{"a":', "}")])
def test_json_that_is_nested_too_deeply(depth: int, left: str, right: str) -> None:
    with pytest.raises(FormatError, match=f"f is not JSON of ours: it is nested deeper than {MAX_DEPTH}"):
        parse_json(left * depth + "1" + right * depth, "f")
    assert parse_json(left * MAX_DEPTH + "1" + right * MAX_DEPTH, "f")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "names 'c' twice"),
        ('{"a": NaN}', "NaN is not a number"),
        ("[-Infinity]", "-Infinity is not a number"),
        ("1e400", "1e400 is beyond every float"),
        ("9" * 5_000, "4300"),
        ("\ufeff{}", "BOM"),
        ("", "Expecting value"),
        ("\0", "Expecting value"),
    ],
)
def test_json_by_pythons_leave_only(text: str, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        parse_json(text.encode(), "f")


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    for name in ("a\0b", "a\ud800", "a" * 5_000, "a/" * 4_000):
        with pytest.raises(FormatError) as raised:
            is_there(tmp_path / name)
        assert str(raised.value).isprintable()
    (tmp_path / "loop").symlink_to("loop")
    for use in (is_there, read_json, resolved, find_weights_in, lambda path: write_json(path, 1), read_checkpoint):
        with pytest.raises(FormatError, match="symbolic links"):
            use(tmp_path / "loop")
    assert as_path(tmp_path / "nothing") == tmp_path / "nothing"
    assert not is_there(tmp_path / "nothing" / "at all")


def find_weights_in(path: Path) -> Path:
    return find_weights(path, ("x.pth",))


def test_messages_are_one_line_that_can_be_printed() -> None:
    assert str(HeatKVError("a\nb\x1b[31m\ud800")) == "a b\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}"
    assert str(HeatKVError("a  b")) == "a  b"
    assert len(str(HeatKVError("a" * 10**6))) == 2000
    assert shown(10**5_000) == "a whole number of 16610 bits"
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    assert len(shown(nested)) <= 60
    assert shown([1, 2.5, "x", None]) == "[1, 2.5, 'x', None]"


def test_a_text_among_numbers_does_not_widen_them() -> None:
    wide = [[["x"] * 2_000 + ["y" * 500_000]]]
    tracemalloc.start()
    assert regular_array(wide, 3) is None
    assert tracemalloc.get_traced_memory()[1] < 10**6  # numpy would take 4 GB
    tracemalloc.stop()
    assert regular_array([[[1, True]]], 3) is None
    assert regular_array([[[1, 2]], [[3]]], 3) is None
    assert regular_array([[[2**63]]], 3) is None
    assert regular_array([[[1.0]]], 3) is None
    assert np.array_equal(regular_array([[[1, 2]]], 3), [[[1, 2]]])  # type: ignore[arg-type]
    assert regular_array([[[1, 2.5]]], 3, floats=True).dtype == np.float64  # type: ignore[union-attr]
    assert regular_array([[[10**400]]], 3, floats=True) is None


# ------------------------------------------------------------------------------------------------ absurd sizes


def test_schedules_and_geometries_have_limits() -> None:
    with pytest.raises(ScheduleError, match=f"at most {MAX_SCALES} scales, this one has {MAX_SCALES + 1}"):
        ScaleSchedule.of([[1, 1]] * (MAX_SCALES + 1))
    largest = ScaleSchedule(((65536, 65536, 65536),) * 2)
    with pytest.raises(PlanError, match="token-heads; at most"):
        CacheGeometry(1, 65536, 64, largest)
    assert CacheGeometry(1, 1, 64, largest).full_token_heads == 2**48


def test_what_a_plan_holds_takes_the_memory_of_the_plan() -> None:
    last_read = np.broadcast_to(np.arange(MAX_SCALES), (20, 5, MAX_SCALES)).copy()
    last_read[:, :, ::2] = MAX_SCALES - 1
    tracemalloc.start()
    held = held_for_targets([last_read], [[1] * MAX_SCALES])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 10 * last_read.nbytes
    assert np.array_equal(held[3, 2], (np.arange(MAX_SCALES) + 1) // 2)


@pytest.mark.parametrize("text", ["1" * 100_000 + "!", "9" * 5_000, "1e9999%", " " * 100_000, "\u0661\u0660%"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(BudgetError):
        Budget.parse(text)


def test_budgets_of_numbers_that_python_does_not_write_out() -> None:
    with pytest.raises(BudgetError, match="a whole number of"):
        Budget.parse(10**5_000)


# ------------------------------------------------------------------------------------------------- torch files


def _saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_no_pickle_runs(tmp_path: Path, watch: Watch) -> None:
    canary, path = tmp_path / CANARY, tmp_path / "x.pth"
    told = {}
    for name, data in hostile_pickles(canary).items():
        for form in (zipped({"x/data.pkl": data, "x/version": b"3\n", "x/byteorder": b"little"}), data):
            path.write_bytes(form)
            told.setdefault(name, outcome(lambda: read_checkpoint(path), watch, canary))
    assert {name for name, outcome in told.items() if outcome == "whole"} == {
        "plain values", "names that are no text", "lists within lists", "a deep list", "a memo place of 10^9",
        "an unknown protocol",
    }  # fmt: skip
    for name in ("os.mkdir", "builtins.exec", "bytearray of 100 GB", "storage of 8 TB", "a deep tuple as a name"):
        assert "could run code" in told[name]
    assert "it names 'builtins exec'" in told["builtins.exec"]


def test_what_trainers_save_is_read(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 3)
    optimiser = torch.optim.AdamW([{"params": [p], "betas": (0.9, 0.95)} for p in module.parameters()])
    module(torch.zeros(1, 2)).sum().backward()
    optimiser.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimiser, [3, 3, 7])
    content = {
        "model": module.state_dict(), "parameter": module.weight, "optimiser": optimiser.state_dict(),
        "milestones": scheduler.milestones, "args": {"lr": 1e-3, "names": {"a", "b"}, "dtype": torch.bfloat16},
        "half": torch.ones(3, dtype=torch.bfloat16), "eight": torch.ones(4).to(torch.float8_e4m3fn),
        "complex": 1j, "bytes": b"\0\xff", "size": torch.Size([2, 3]), "none": None, "shared": [module.weight] * 3,
    }  # fmt: skip
    found = read_checkpoint(_saved(tmp_path / "x.pth", content))
    assert torch.equal(found["model"]["weight"], module.weight)
    assert found["milestones"] == scheduler.milestones
    assert found["args"] == content["args"]
    assert found["bytes"] == b"\0\xff"
    assert found.keys() == content.keys()


@pytest.mark.parametrize("name", ["data.pkl", "version"])
def test_packed_archives_are_not_unpacked(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(with_bomb(name, 32))
    assert path.stat().st_size < 10**6
    with pytest.raises(FormatError, match="more bytes than the file has"):
        read_checkpoint(path)
    path.write_bytes(zipped({"x/data.pkl": b"\x80\x02}.", "x/version": b"3\n"}, compressed=True))
    with pytest.raises(FormatError, match="packed or encrypted"):
        read_checkpoint(path)


def test_an_archive_that_two_readers_could_read_differently(tmp_path: Path) -> None:
    data = _saved(tmp_path / "x.pth", {"a": torch.zeros(3)}).read_bytes()
    with zipfile.ZipFile(tmp_path / "x.pth") as file:
        directory = file.start_dir
    changed = bytearray(data)
    struct.pack_into("<Q", changed, len(data) - 98 + 48, directory - 50)
    for other in (b"x" + data, data + b"x", data[:-2] + b"\1\0" + b"x", bytes(changed), data + data):
        (tmp_path / "y.pth").write_bytes(other)
        with pytest.raises(FormatError, match="not a whole torch file"):
            read_checkpoint(tmp_path / "y.pth")


def test_tensors_larger_than_their_file(tmp_path: Path) -> None:
    stretched = {"word_embed.weight": torch.zeros(1).expand(10**6, 10**6)}
    with pytest.raises(FormatError, match="its tensors would take 4000000000000 bytes"):
        read_checkpoint(_saved(tmp_path / "x.pth", stretched))
    with pytest.raises(FormatError, match=r"it names 'torch[.]_utils _rebuild_sparse_tensor'"):
        read_checkpoint(_saved(tmp_path / "x.pth", {"x": torch.zeros(3, 3).to_sparse()}))


def test_shapes_are_compared_before_memory_is_taken(targets: dict[str, Any]) -> None:
    """A few small tensors ask for a network of 4 TB."""
    state = dict(var_state(read_checkpoint(targets["VAR .pth"].folder / "x.pth")))
    build_var(state)
    state["word_embed.weight"] = torch.zeros(2**20, 1)
    state["blocks.0.attn.scale_mul_1H11"] = torch.zeros(1, 2, 1, 1)
    with pytest.raises(ModelError, match=r"these weights are not the VAR transformer's: .*, not \(1048576"):
        build_var(state)
    infinity = read_checkpoint(targets["Infinity .safetensors"].folder / "x.safetensors")
    for name, tensor, said in (
        ("word_embed.weight", torch.zeros(3), "must have 2 axes"),
        ("word_embed.weight", torch.zeros(0, 4), "of shape"),
        ("lvl_embed.weight", torch.zeros(15, 16, dtype=torch.int64), "not of floating-point numbers"),
        ("blocks.999.x", torch.zeros(1), "at most 256"),
        (f"blocks.{'9' * 5_000}.x", torch.zeros(1), "unexpected blocks.999"),
    ):
        with pytest.raises(ModelError, match=said):
            build_infinity({**infinity, name: tensor})


@pytest.mark.parametrize("name", ["..", ".", "", "../x.safetensors", "/etc/passwd", "sub", "loop", "a\0", "a" * 300])
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, targets: dict[str, Any], name: str) -> None:
    whole_file = targets["Infinity .safetensors"].folder / "x.safetensors"
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):  # what would be read
        (place / "model.safetensors").write_bytes(whole_file.read_bytes())
    (tmp_path / "x.safetensors").write_bytes(whole_file.read_bytes())
    (folder / "loop").symlink_to(".")
    index = {"weight_map": dict.fromkeys(read_checkpoint(whole_file), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError):
        read_checkpoint(folder)


# ------------------------------------------------------------------------------------------- pictures and results


def test_pictures_are_pngs_of_bounded_size(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.new("RGB", (4, 3)).save(path)
    assert read_pixels(path).shape == (3, 4, 3)
    Image.new("L", (4, 3)).save(path)
    with pytest.raises(FormatError, match="of kind L"):
        read_pixels(path)
    for kind in ("EPS", "GIF", "BMP", "TIFF"):  # for the first, Pillow starts Ghostscript
        Image.new("RGB", (4, 3)).save(path, format=kind)
        with pytest.raises(FormatError, match="no whole PNG"):
            read_pixels(path)
    Image.new("RGB", (4, 3)).save(path)
    data = bytearray(path.read_bytes())
    for width, height, said in ((10_000, 9_000, "at most 80000000"), (2**31 - 1, 2**31 - 1, "no whole PNG")):
        struct.pack_into(">II", data, 16, width, height)
        struct.pack_into(">I", data, 29, zlib.crc32(bytes(data[12:29])))
        path.write_bytes(data)
        with pytest.raises(FormatError, match=said):
            read_pixels(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: told.update(request=[]), "its request is"),
        (lambda told: told["rows"][1].update(comparison=[]), "'comparison' is"),
        (lambda told: told["rows"][1].update(pictures=0.5), "'pictures' is 0.5; it must be a whole number"),
        (lambda told: told["rows"][1].update(kl=1e300), "'kl' is 1e"),
        (lambda told: told["rows"][1].update(kl_of_images=[0.1]), "one number for each of the images"),
        (lambda told: told["rows"][1]["latency_ms"].update(interval=3), "'latency_ms' is"),
        (lambda told: told["rows"][1]["memory"].update(steps=[1]), "'memory' is"),
        (lambda told: told["rows"][1]["memory"].pop("host"), "'memory' is"),
        (lambda told: told["rows"][1].update(not_measured=[1]), "'not_measured' is"),
        (lambda told: told["rows"].append(None), "row 3 is None"),
    ],
)
def test_results_are_checked_where_they_are_read(
    targets: dict[str, Any], tmp_path: Path, change: Callable[[Any], Any], said: str
) -> None:
    told = json.loads((targets["check"].folder / "results.json").read_text())
    read_results(targets["check"].folder / "results.json")
    change(told)
    (tmp_path / "results.json").write_text(json.dumps(told))
    with pytest.raises(FormatError, match=said):
        read_results(tmp_path / "results.json")


def test_the_text_encoder_imports_nothing_of_its_folder(tmp_path: Path, t5_folder: Path) -> None:
    """A folder may name a module of its own; if not told otherwise, transformers asks whether to run it."""
    folder = Path(shutil.copytree(t5_folder, tmp_path / "t5"))
    (folder / "own.py").write_text(f"import os; os.mkdir({str(tmp_path / CANARY)!r})\n")
    for name, classes in (
        ("config.json", {"AutoConfig": "own.C"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["own.T"] * 2}),
    ):
        told = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(told | {"auto_map": classes}))
    T5TextEncoder(folder)
    for name, field in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")):
        told = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(told | {field: "own"}))
    with pytest.raises(ModelError, match="no T5 encoder can be loaded"):
        T5TextEncoder(folder)
    assert not (tmp_path / CANARY).exists()


def test_weights_are_looked_for_in_folders_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot read"):
        load_model("var-d16", tmp_path / ("a" * 5_000))
