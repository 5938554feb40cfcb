"""Files of runs whose contents are wrong though every seal fits, as an attack on replay, export, resume and eval.

    python tests/attack/attack_sealed.py [WORD]

tries those files whose name has the word in it.

Each key of a journal's header and of its groups, of a snapshot's metadata, of the best state's metadata, of run.json
and its settings, and of a Trainer checkpoint's seal and state is left out, and gets each of VALUES; checksums and seals
are made anew. Every command then ends well or in one line; with another snapshot, which is a help alone, in the same
end. The number of threads and what carries the codes are told where they are others, and change no exit code.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import figures
import lives
import torch
import trainer_lives
from crash_works import TRAIN, works
from crashes import alive

import qzo
from qzo.commands.main import main as command
from qzo.durable import read_tensors, write_tensors
from qzo.journal import lines
from qzo.training.checkpoints import SEAL, seal
from qzo.training.run import SUMS, _sum

VALUES = (None, "nonsense", -1, 10**30, 1.5, True, [], {}, [{}], "cuda", "0" * 64, "\x1b[2J\n")
MISSING = object()
WRONG = ("tracebacks", "more_than_a_line", "different", "changed_exit_code")
Change = Callable[[dict[str, Any]], object]


def changes(content: dict[str, Any]) -> Iterator[tuple[str, Change]]:
    """Each key of a JSON object, and of the objects in it, left out and with each of VALUES."""
    for key, value in content.items():
        for wrong in (MISSING, *VALUES):
            yield f"{key}={wrong!r}" if wrong is not MISSING else f"no {key}", lambda to, k=key, w=wrong: _put(to, k, w)
        inner = value[0] if isinstance(value, list) and value else value
        if isinstance(inner, dict):
            is_list = isinstance(value, list)
            for name, change in changes(inner):
                yield f"{key}.{name}", lambda to, k=key, c=change, i=is_list: c(to[k][0] if i else to[k])


def _put(to: dict[str, Any], key: str, value: Any) -> None:
    if value is MISSING:
        to.pop(key)
    else:
        to[key] = value


def journal_header(file: Path, change: Change | None) -> dict[str, Any]:
    """Of a journal: changed, its lines sealed anew; as it was."""
    first, *rest = file.read_bytes().splitlines(keepends=True)
    header = json.loads(first.rpartition(b" ")[0])
    if change is not None:
        change(changed := json.loads(json.dumps(header)))
        data, crc = lines.seal(json.dumps(changed, separators=(",", ":")), 0)
        for line in rest:
            sealed, crc = lines.seal(line.rpartition(b" ")[0].decode(), crc)
            data += sealed
        file.write_bytes(data)
    return header


def metadata(file: Path, change: Change | None) -> dict[str, Any]:
    """Of a sealed safetensors file."""
    tensors, found = read_tensors(file)
    if change is not None:
        change(changed := dict(found))
        write_tensors(file, tensors, {name: str(value) for name, value in changed.items()})
    return dict(found)


def run_json(file: Path, change: Change | None) -> dict[str, Any]:
    """What a run was begun with, the sums in it made anew."""
    found = plain_json(file, change)
    content = json.loads(file.read_text())
    if isinstance(content.get(SUMS), dict):
        content[SUMS] = {**content[SUMS], "settings": _sum(content.get("settings"))}
        file.write_text(json.dumps(content))
    return found


def plain_json(file: Path, change: Change | None) -> dict[str, Any]:
    """A file without a seal."""
    found = json.loads(file.read_text())
    if change is not None:
        change(changed := json.loads(json.dumps(found)))
        file.write_text(json.dumps(changed))
    return found


def checkpoint(file: Path, change: Change | None) -> dict[str, Any]:
    """The seal or the state of a Trainer's checkpoint, the seal made anew."""
    if file.name != SEAL:
        found = plain_json(file, change)
        about = json.loads((file.parent / SEAL).read_text())
        (file.parent / SEAL).unlink()
        seal(file.parent, {k: v for k, v in about.items() if k not in ("version", "written", "files", "seal")})
        return found
    about = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("version", "written", "files", "seal")}
    if change is not None:
        change(changed := dict(about))
        file.unlink()
        seal(file.parent, changed)
    return about


def main(word: str) -> NoReturn:
    """All files, or those with a word in their name."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        works(place)
        trained, packed = place / "trained", str(place / "packed")
        (own := place / "own").mkdir()
        assert alive(lambda: lives.train(own, "momentum", stop=9) and 0)[0] == 0
        (trainer := place / "trainer").mkdir()
        assert alive(lambda: trainer_lives.live(Path(packed), trainer))[0] == 0

        def resumed(at: Path) -> int:
            return command(["train", packed, *TRAIN, "--steps", "6", "--out", str(at), "--resume"])

        def taken_up(at: Path) -> int:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                truth = lives.train(at, "momentum", stop=12)
            torch.save(truth, at / "end")
            print(*(str(warning.message) for warning in told), sep="\n", file=sys.stderr)
            return 0

        def trained_on(at: Path) -> int:
            trainer_lives.make(Path(packed), at, max_steps=6).train(resume_from_checkpoint=True)
            return 0

        def exported(name: str) -> Callable[[Path], int]:
            return lambda at: command(["export", str(at / name), str(at / "exported")])

        replayed: Callable[[Path], int] = lambda at: command(  # noqa: E731
            ["replay", packed, str(at / "run.journal"), str(at / "out")]
        )
        evaluated: Callable[[Path], int] = lambda at: command(  # noqa: E731
            ["eval", str(at), "--test-samples", "4", "--task", "words"]
        )
        newest = f"out/{sorted(file.name for file in (trainer / 'out').glob('checkpoint-*'))[-1]}"
        attacks = [
            (trained, "run.journal", journal_header, {"replay": replayed, "resume": resumed}),
            (trained, "best.safetensors", metadata, {"export": exported("."), "resume": resumed}),
            (trained, "run.json", plain_json, {"export": exported("."), "resume": resumed, "eval": evaluated}),
            (trained, "run.json", run_json, {"export": exported("."), "resume": resumed}),
            (own, "run.journal.safetensors", metadata, {"resume": taken_up}),
            (trainer, f"{newest}/{SEAL}", checkpoint, {"export": exported(newest), "resume": trained_on}),
            (trainer, f"{newest}/trainer_state.json", checkpoint, {"resume": trained_on}),
        ]
        for source, name, edit, uses in [entry for entry in attacks if word in entry[1]]:
            _attack(source, name, edit, uses, counts)
    figures.finish("sealed", counts["tried"], **{what: counts[what] for what in WRONG})


def _attack(source: Path, name: str, edit, uses: dict[str, Callable[[Path], int]], counts: Counter[str]) -> None:
    for use, run in uses.items():
        _, _, end = _life(source, name, edit, None, run)
        for what, change in changes(edit(source / name, None)):
            code, text, result = _life(source, name, edit, change, run)
            said = [line for line in text.splitlines() if "error: " in line]
            wrong = ["tracebacks"] * ("Traceback" in text or code not in (0, 2))
            wrong += ["more_than_a_line"] * ((code == 2 and len(said) != 1) or "\x1b" in text)
            wrong += ["different"] * (name.endswith("journal.safetensors") and result != end)
            wrong += ["changed_exit_code"] * (what.partition("=")[0] in ("threads", "carrier") and code != 0)
            counts.update([*wrong, "tried"])
            if wrong:
                print(f"{name} {what!r}, {use}: {wrong} {code} {text[-500:]!r}", flush=True)


def _life(source: Path, name: str, edit, change: Change | None, run) -> tuple[int, str, bytes | None]:
    """Exit code, what was printed, and the end of a program of a user's own."""
    with tempfile.TemporaryDirectory() as life:
        at = Path(life) / "at"
        shutil.copytree(source, at)
        edit(at / name, change)

        def work() -> int:
            try:
                return run(at)
            except qzo.QzoError as error:
                print(f"error: {error}")
                return 2

        code, text = alive(work)
        return code, text, (at / "end").read_bytes() if (at / "end").exists() else None


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
