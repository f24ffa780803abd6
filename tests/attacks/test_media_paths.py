"""Hostile paths. Only `MediaError` may come out."""

import os
import re
from pathlib import Path

import pytest
import tiny_media
from refusals import refused

from unimoe.processing.media_fetch_unimoe import is_url
from unimoe.processing.media_policy_unimoe import MediaError, MediaPolicy
from unimoe.processing.media_unimoe import load_image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a.png").write_bytes(tiny_media.encoded_picture())
    (tmp_path / "outside.png").write_bytes(tiny_media.encoded_picture())
    (tmp_path / "root-sibling").mkdir()
    (tmp_path / "root-sibling" / "b.png").write_bytes(tiny_media.encoded_picture())
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "inside-link.png").symlink_to(folder / "inner" / "a.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe.png")
    return folder


@pytest.mark.parametrize(
    "path",
    [
        "../outside.png",
        "inner/../../outside.png",
        "../root-sibling/b.png",
        "{root}/../outside.png",
        "{root}-sibling/b.png",
        "/etc/passwd",
        "link.png",
        "up/outside.png",
        "loop",
        "pipe.png",
        "inner",
        ".",
        "",
        " ",
        "inner/a.png\0.jpg",
        "\0",
        "missing.png",
        "CON",
        "nul.png",
        "inner/COM1.png",
        "inner\\LPT1",
        "/dev/zero",
        "/proc/self/environ",
        "~/a.png",
        "a" * 5000,
    ],
)
def test_no_path_leaves_the_root(root: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real_open = os.open
    monkeypatch.setattr(os, "open", lambda p, *a, **k: (opened.append(os.fspath(p)), real_open(p, *a, **k))[1])
    with refused("path|file", "image at message 3"):
        load_image(path.format(root=root), MediaPolicy(media_root=str(root)), "message 3, content 0")
    assert all(Path(p).is_relative_to(root) for p in opened)


def test_paths_inside_the_root_are_read(root: Path) -> None:
    policy = MediaPolicy(media_root=str(root))
    for path in ("inner/a.png", root / "inner" / "a.png", "inside-link.png", "inner/../inner/a.png", b"inner/a.png"):
        value = os.fsdecode(path) if isinstance(path, bytes) else path
        assert load_image(value, policy).size == (24, 20)
    with refused("paths are refused", "image"):
        load_image("inner/a.png", MediaPolicy(allow_paths=False))


def test_messages_name_paths_as_they_were_given_and_not_where_they_lead(root: Path) -> None:
    long = "deep/" * 100 + "x.png"
    for path in ("../outside.png", "missing/x.png", "/etc/hostname", "inner/a.wav", "a", "\x1b[2Jx\n.png", long):
        with pytest.raises(MediaError) as caught:
            load_image(path, MediaPolicy(media_root=str(root)), "message 0, content 0")
        assert f"image at message 0, content 0, {path if path != long else '...' + long[-200:]!r}: " in str(
            caught.value
        )
        assert str(root) not in str(caught.value)
        with pytest.raises(MediaError, match=re.escape(f"image at {path if path != long else '...' + long[-200:]!r}")):
            load_image(path, MediaPolicy(media_root=str(root)))


def test_urls_are_told_from_paths() -> None:
    assert all(
        is_url(text) for text in ("http://a", "HTTPS://a", " http://a", "//a/b", "\\\\a\\b", "data:x", "file:/x")
    )
    assert not any(is_url(text) for text in ("a.png", "a/b//c.png", "./http/a", "C:\\a.png", "a:b.png"))
