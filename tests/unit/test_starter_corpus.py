"""The starter corpus as it lies in the repository: whole, small, licensed, and without leaks between the splits."""

import hashlib
import io
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unimoe.errors import DataError
from unimoe.starter_corpus import build, build_images, build_sounds, build_videos, corpus, sources, voices
from unimoe.starter_corpus.audio_files import SAMPLE_RATE, with_fixed_serial
from unimoe.starter_corpus.concepts import CATEGORIES, CONCEPTS, HELDOUT_TEXT_WORDS
from unimoe.starter_corpus.records import answer_of, question_of, rng_for
from unimoe.starter_corpus.text_questions import build_text_questions
from unimoe.starter_corpus.text_sentences import all_sentences

LARGEST_CORPUS = 10_000_000
FEWEST = {  # (train, held out)
    "image": (600, 60),
    "speech": (700, 150),
    "sound": (150, 40),
    "video_direction": (300, 80),
    "video_object": (300, 80),
    "text": (400, 100),
}
ROOT = corpus.corpus_root()


@pytest.fixture(scope="module")
def train() -> list[corpus.Sample]:
    return corpus.load_samples("train")


@pytest.fixture(scope="module")
def heldout() -> list[corpus.Sample]:
    return corpus.load_samples("heldout")


@pytest.fixture(scope="module")
def stage0() -> list[corpus.Sample]:
    return corpus.load_samples("stage0")


def of_task(samples: list[corpus.Sample], task: str) -> list[corpus.Sample]:
    return [sample for sample in samples if sample["task"] == task]


def media_of(sample: corpus.Sample) -> str | None:
    """The path of its medium, None for text."""
    return next((str(item["path"]) for item in sample["messages"][0]["content"] if item["type"] != "text"), None)


def digest(sample: corpus.Sample) -> str:
    return corpus.file_digest(Path(media_of(sample)))


# ---------------------------------------------------------------- whole and small


def test_checksums_hold_and_cover_every_built_file() -> None:
    checked = corpus.verify()
    named = {line.split("  ")[1] for line in (ROOT / corpus.CHECKSUM_FILE).read_text().splitlines()}
    assert checked == len(named)
    for folder in build.MEDIA_FOLDERS:
        for path in (ROOT / folder).iterdir():
            assert path.relative_to(ROOT).as_posix() in named, f"{path} is in no checksum"


def test_corpus_stays_under_ten_megabytes() -> None:
    files = [path for path in ROOT.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= LARGEST_CORPUS


def test_verify_names_the_damaged_and_the_missing_file(tmp_path: Path) -> None:
    name = "sounds/x.ogg"
    (tmp_path / "sounds").mkdir()
    (tmp_path / name).write_bytes(b"sound")
    (tmp_path / corpus.CHECKSUM_FILE).write_text(f"{hashlib.sha256(b'sound').hexdigest()}  {name}\n")
    assert corpus.verify(tmp_path) == 1
    (tmp_path / name).write_bytes(b"sounD")
    with pytest.raises(DataError, match=f"{name} is damaged"):
        corpus.verify(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        corpus.verify(tmp_path)


def test_every_listed_file_exists_and_every_media_file_is_listed(
    train: list[corpus.Sample], heldout: list[corpus.Sample]
) -> None:
    listed = {Path(path) for sample in train + heldout if (path := media_of(sample)) is not None}
    present = {path for folder in build.MEDIA_FOLDERS for path in (ROOT / folder).iterdir()}
    assert listed == present


def test_identities_are_unique(train: list[corpus.Sample], heldout: list[corpus.Sample]) -> None:
    identities = [sample["id"] for sample in train + heldout]
    assert len(set(identities)) == len(identities)


def test_loader_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'test' does not exist"):
        corpus.load_samples("test")
    with pytest.raises(DataError, match=r"train\.jsonl is missing"):
        corpus.load_samples("train", root=tmp_path)
    (tmp_path / "train.jsonl").write_text('{"id": 1, "modality": "text"}\n{oh\n')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        corpus.load_samples("train", root=tmp_path)


# ---------------------------------------------------------------- decoding


def test_every_picture_decodes(train: list[corpus.Sample], heldout: list[corpus.Sample]) -> None:
    for sample in of_task(train, "image"):
        icon = Image.open(media_of(sample)).convert("RGBA")
        assert icon.size == (64, 64)
        alpha = np.asarray(icon)[..., 3]
        assert alpha.min() == 0, f"{sample['id']} has no transparency"
        assert (alpha > 128).mean() > 0.03, f"{sample['id']} is empty"
    for sample in of_task(heldout, "image"):
        picture = Image.open(media_of(sample))
        assert picture.size == (corpus.PICTURE_SIZE, corpus.PICTURE_SIZE)
        assert picture.mode == "RGB"
        assert np.asarray(picture).std() > 5, f"{sample['id']} shows nothing"


def test_every_recording_decodes(train: list[corpus.Sample], heldout: list[corpus.Sample]) -> None:
    soundfile = pytest.importorskip("soundfile")
    longest = {"speech": 3.0, "sound": 3.0}
    for sample in train + heldout:
        if sample["modality"] not in longest:
            continue
        wave, rate = soundfile.read(media_of(sample), dtype="float32")
        assert rate == SAMPLE_RATE
        assert wave.ndim == 1
        assert 0.15 <= len(wave) / rate <= longest[sample["modality"]] + 0.01, sample["id"]
        assert np.abs(wave).max() > 0.05, f"{sample['id']} is silent"


def test_every_video_decodes_and_moves_the_way_it_says(
    train: list[corpus.Sample], heldout: list[corpus.Sample]
) -> None:
    av = pytest.importorskip("av")
    for sample in of_task(train + heldout, "video_direction"):
        with av.open(media_of(sample)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == build_videos.FRAMES
        assert frames[0].shape == (build_videos.FRAME_SIZE, build_videos.FRAME_SIZE, 3)
        assert moving_direction(frames) == answer_of(sample), sample["id"]


def moving_direction(frames: list[np.ndarray]) -> str:
    """Where the edges in the picture go (the backgrounds are smooth), between the first and the last frame that show
    the thing well: it may enter or leave the picture."""
    centres, amounts = [], []
    for frame in frames:
        vertical, horizontal, _ = np.gradient(frame.astype(np.float32))
        edges = np.hypot(vertical, horizontal).sum(-1) ** 2 + 1e-6
        rows, columns = np.indices(edges.shape)
        centres.append(((edges * columns).sum() / edges.sum(), (edges * rows).sum() / edges.sum()))
        amounts.append(edges.sum())
    first, *_, last = (centre for centre, amount in zip(centres, amounts, strict=True) if amount > 0.3 * max(amounts))
    x, y = last[0] - first[0], last[1] - first[1]
    if abs(x) > abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


# ---------------------------------------------------------------- counts and answers


@pytest.mark.parametrize("task", list(FEWEST))
def test_counts(task: str, train: list[corpus.Sample], heldout: list[corpus.Sample]) -> None:
    fewest_train, fewest_heldout = FEWEST[task]
    assert len(of_task(train, task)) >= fewest_train
    assert len(of_task(heldout, task)) >= fewest_heldout


@pytest.mark.parametrize("task", list(FEWEST))
def test_no_answer_dominates(task: str, train: list[corpus.Sample], heldout: list[corpus.Sample]) -> None:
    most = {"video_direction": 0.3, "text": 0.2}.get(task, 0.15)
    for samples in (of_task(train, task), of_task(heldout, task)):
        (_, count), *_ = Counter(answer_of(sample) for sample in samples).most_common(1)
        assert count / len(samples) <= most


@pytest.mark.parametrize("task", list(FEWEST))
def test_heldout_answers_are_taught(
    task: str, train: list[corpus.Sample], heldout: list[corpus.Sample], stage0: list[corpus.Sample]
) -> None:
    taught = {answer_of(sample) for sample in of_task(train, task)}
    if task == "text":  # facts of the held-out things are stated in stage 0
        stated = " ".join(row["text"].lower() for row in stage0 if "text" in row)
        missing = {answer for sample in of_task(heldout, task) if (answer := answer_of(sample)) not in taught}
        assert all(answer in stated for answer in missing)
    else:
        assert {answer_of(sample) for sample in of_task(heldout, task)} <= taught


def test_yes_and_no_are_balanced(train: list[corpus.Sample], heldout: list[corpus.Sample]) -> None:
    for samples in (train, heldout):
        answers = Counter(answer_of(sample) for sample in of_task(samples, "text"))
        assert answers["yes"] == answers["no"]


def test_samples_follow_the_data_format(train: list[corpus.Sample], heldout: list[corpus.Sample]) -> None:
    content_types = {"image": "image", "speech": "audio", "sound": "audio", "video": "video"}
    for split, samples in (("train", train), ("heldout", heldout)):
        for sample in samples:
            assert sample["split"] == split
            assert [message["role"] for message in sample["messages"]] == ["user", "assistant"]
            *media, text = sample["messages"][0]["content"]
            assert text["type"] == "text"
            wanted = content_types.get(sample["modality"])
            assert [item["type"] for item in media] == ([wanted] if wanted else [])


# ---------------------------------------------------------------- no leaks


def test_no_medium_is_in_both_splits(train: list[corpus.Sample], heldout: list[corpus.Sample]) -> None:
    digests = {digest(sample) for sample in train if media_of(sample)}
    assert not digests & {digest(sample) for sample in heldout if media_of(sample)}


def test_heldout_artists_are_never_trained_on(train: list[corpus.Sample], heldout: list[corpus.Sample]) -> None:
    def artists(samples: list[corpus.Sample], *tasks: str) -> set[str]:
        return {sample["source"]["set"] for task in tasks for sample in of_task(samples, task)}

    assert artists(heldout, "image") == {build_images.HELDOUT_ARTIST}
    assert artists(heldout, "video_direction", "video_object") == {build_images.HELDOUT_VIDEO_ARTIST}
    seen = artists(train, "image", "video_direction", "video_object")
    assert not seen & {build_images.HELDOUT_ARTIST, build_images.HELDOUT_VIDEO_ARTIST}


def test_heldout_voices_are_never_trained_on(train: list[corpus.Sample], heldout: list[corpus.Sample]) -> None:
    heard = {sample["source"]["voice"] for sample in of_task(train, "speech")}
    unheard = {sample["source"]["voice"] for sample in of_task(heldout, "speech")}
    assert not heard & unheard
    assert {"flite-slt", "flite-awb"} <= unheard
    variants = {voice.rpartition("+")[2] for voice in heard if voice.startswith("espeak")}
    assert not variants & set(voices.ESPEAK_HELDOUT_VARIANTS)


def test_no_recording_is_in_both_splits(train: list[corpus.Sample], heldout: list[corpus.Sample]) -> None:
    def recordings(samples: list[corpus.Sample]) -> set[tuple[str, str]]:
        return {(one["source"]["set"], one["source"]["recording"]) for one in of_task(samples, "sound")}

    assert not recordings(train) & recordings(heldout)
    assert {answer_of(sample) for sample in of_task(heldout, "sound")} == {c.label for c in build_sounds.SOUND_CLASSES}


def test_copies_of_a_recording_stay_in_one_split() -> None:
    rng = np.random.default_rng(0)
    waves = [rng.standard_normal(4000).astype(np.float32) for _ in range(6)]
    recordings = [build_sounds.Recording("s", f"{i}", wave) for i, wave in enumerate(waves)]
    recordings += [
        build_sounds.Recording("s", f"copy{i}", np.roll(wave, 300) * np.float32(0.5)) for i, wave in enumerate(waves)
    ]
    splits = build_sounds.split_recordings(recordings)
    assert splits[:6] == splits[6:]
    assert set(splits) == {"train", "heldout"}


def test_heldout_text_is_stated_but_never_asked(stage0: list[corpus.Sample], heldout: list[corpus.Sample]) -> None:
    asked = {question_of(row) for row in stage0 if "messages" in row}
    for sample in of_task(heldout, "text"):
        assert sample["source"]["concept"] in HELDOUT_TEXT_WORDS
        assert question_of(sample) not in asked
    stated = [row["text"] for row in stage0 if "text" in row]
    for word in HELDOUT_TEXT_WORDS:
        assert sum(f" {word}" in text.lower() or text.lower().startswith(word) for text in stated) >= 15
    assert not any("?" in text and "what is in the picture?" not in text for text in stated)


def test_stage0_describes_every_label(stage0: list[corpus.Sample]) -> None:
    described: dict[str, set[str]] = {}
    for row in stage0:
        if "messages" in row:
            described.setdefault(row["task"], set()).add(answer_of(row))
    words = {concept.word for concept in CONCEPTS}
    assert described["image"] == described["speech"] == described["video_object"] == words
    assert described["video_direction"] == set(build_videos.DIRECTIONS)
    assert described["sound"] == {sound_class.label for sound_class in build_sounds.SOUND_CLASSES}


# ---------------------------------------------------------------- licences


def test_licence_check_refuses_gpl_and_misplaced_share_alike() -> None:
    sources.check_licences()
    good = sources.SOURCES[0]
    with pytest.raises(DataError, match=r"GPL-2\.0"):
        sources.check_licences((replace(good, licence="GPL-2.0"),))
    with pytest.raises(DataError, match="share-alike licence"):
        sources.check_licences((replace(good, licence="CC-BY-SA-4.0"),))


def test_every_sample_names_a_licensed_source(train: list[corpus.Sample], heldout: list[corpus.Sample]) -> None:
    attribution = (ROOT / "ATTRIBUTION.md").read_text()
    for sample in train + heldout:
        key = sample["source"]["set"]
        if sample["modality"] == "text":
            assert key == "unimoe"
            continue
        source = sources.SOURCE_OF_KEY[key]
        assert f"| {key} |" in attribution
        inside = sources.SHARE_ALIKE_FOLDER in Path(media_of(sample)).relative_to(ROOT).parts
        assert inside == (source.folder == sources.SHARE_ALIKE_FOLDER)
    assert "CC BY-SA 4.0" in (ROOT / sources.SHARE_ALIKE_FOLDER / "LICENSE").read_text()


def test_fetch_refuses_another_file_than_the_pinned_one(tmp_path: Path) -> None:
    source = sources.SOURCES[0]
    (tmp_path / source.filename).write_bytes(b"not the package")
    with pytest.raises(DataError, match="is pinned to"):
        sources.fetch_sources(tmp_path, (source,))


# ---------------------------------------------------------------- the builder repeats itself


def test_text_rebuilds_to_the_same_bytes(tmp_path: Path) -> None:
    media_rows = []
    for name in ("train.jsonl", "heldout.jsonl", "share_alike/heldout.jsonl"):
        rows = [json.loads(line) for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
        media_rows += [row for row in rows if row["modality"] != "text"]
    build.write_text_files(tmp_path, media_rows + build_text_questions())
    for name in build.JSON_FILES:
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes(), name


def test_pictures_and_videos_rebuild_to_the_same_pixels(tmp_path: Path, train: list[corpus.Sample]) -> None:
    icon = Image.open(media_of(of_task(train, "image")[0]))
    for folder in ("a", "b"):
        build_images.write_heldout_pictures(tmp_path / folder, "cat", icon)
    for path in (tmp_path / "a/images").iterdir():
        assert path.read_bytes() == (tmp_path / "b/images" / path.name).read_bytes()
    clips = [build_videos.moving_icon(icon, "up", rng_for("clip")) for _ in range(2)]
    assert all(one.tobytes() == two.tobytes() for one, two in zip(*clips, strict=True))


def test_composed_pictures_vary_and_follow_the_generator(train: list[corpus.Sample]) -> None:
    icon = Image.open(media_of(of_task(train, "image")[0]))
    first = [np.asarray(corpus.compose_image(icon, np.random.default_rng(seed))) for seed in range(4)]
    again = [np.asarray(corpus.compose_image(icon, np.random.default_rng(seed))) for seed in range(4)]
    assert all((one == two).all() for one, two in zip(first, again, strict=True))
    assert all((first[0] != other).any() for other in first[1:])
    assert corpus.compose_image(icon, np.random.default_rng(0), size=64).size == (64, 64)


def test_background_differs_from_the_icon_in_brightness() -> None:
    weights = np.float32([0.299, 0.587, 0.114]) / 255
    for seed in range(50):
        background = corpus.random_background(np.random.default_rng(seed), 16, avoid_brightness=0.1)
        brightness = np.asarray(background) @ weights
        assert np.abs(brightness - 0.1).min() > corpus.MINIMUM_CONTRAST - 0.02


def test_ogg_files_do_not_depend_on_the_random_stream_number() -> None:
    soundfile = pytest.importorskip("soundfile")
    wave = np.sin(np.arange(8000) / 20).astype(np.float32)
    written = []
    for _ in range(2):
        buffer = io.BytesIO()
        soundfile.write(buffer, wave, SAMPLE_RATE, format="OGG", subtype="OPUS")
        written.append(with_fixed_serial(buffer.getvalue(), serial=7))
    assert written[0] == written[1]
    decoded, rate = soundfile.read(io.BytesIO(written[0]))
    assert (len(decoded), rate) == (len(wave), SAMPLE_RATE)


def test_concepts_are_complete() -> None:
    words = [concept.word for concept in CONCEPTS]
    assert len(set(words)) == len(words) >= 70
    assert set(words) >= HELDOUT_TEXT_WORDS
    assert 0.18 <= len(HELDOUT_TEXT_WORDS) / len(words) <= 0.22
    for category in CATEGORIES:
        assert sum(concept.category == category for concept in CONCEPTS) >= 10
    assert len(set(all_sentences())) == len(all_sentences()) > 3000


def test_loader_reads_another_root_and_one_modality(tmp_path: Path) -> None:
    shutil.copy(ROOT / "train.jsonl", tmp_path / "train.jsonl")
    samples = corpus.load_samples("train", "video", root=tmp_path)
    assert {sample["modality"] for sample in samples} == {"video"}
    assert Path(media_of(samples[0])).parent == tmp_path / "videos"
