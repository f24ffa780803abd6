"""Compares the memory that is said beforehand for long recordings and videos with what their answers then take.

    python benchmarks/long_media.py quickstart-out/model --speech word.ogg --minutes 10 20
    python benchmarks/long_media.py whisper-base --speech word.ogg --minutes 10

The recording is a clip, repeated; the video has it as its sound track. MODEL is a folder, or the name of a tower's shape in
`SHAPES`: a model with random weights, a small decoder and towers of that shape, in windows of 30 s. Every case runs in a
process of its own, after a short clip that loads what is needed; measured is the most anonymous memory beyond that. Freed
memory is given back at once, as `unimoe chat` and `unimoe serve` have it; with --keep the C library does as it likes. Linux.
"""

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

from unimoe.processing.media_audio_unimoe import load_audio  # noqa: E402
from unimoe.serving.answering import load_answerer  # noqa: E402
from unimoe.serving.freed_memory import give_back_freed_memory  # noqa: E402

RATE = 16_000
# Width, layers and heads of Whisper's encoders.
SHAPES = {"whisper-tiny": (384, 4, 6), "whisper-base": (512, 6, 8), "whisper-small": (768, 12, 12)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--speech", type=Path, required=True, metavar="FILE", help="a clip to repeat")
    parser.add_argument("--minutes", type=float, nargs="+", default=[10.0])
    parser.add_argument("--kinds", nargs="+", choices=("speech", "audio", "video"), default=["speech", "video"])
    parser.add_argument("--keep", action="store_true", help="let the C library keep what is freed")
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        model = args.model if args.model not in SHAPES else save_shape(args.model, Path(folder) / args.model)
        for kind in args.kinds:
            for minutes in args.minutes:
                file = Path(folder) / (f"{kind}-{minutes:g}" + (".mp4" if kind == "video" else ".wav"))
                write(file, load_audio(str(args.speech), RATE), minutes * 60)
                short = Path(folder) / f"short{file.suffix}"
                write(short, load_audio(str(args.speech), RATE), 3.0)
                with spawn.Pool(1) as pool:
                    print(
                        json.dumps(pool.apply(measure, (str(model), kind, str(short), str(file), args.keep))),
                        flush=True,
                    )


def measure(model: str, kind: str, short: str, file: str, keep: bool) -> dict[str, Any]:
    """What is said of a conversation with a file, and what answering it takes."""
    if not keep:
        give_back_freed_memory()
    answer = load_answerer(model, "cpu", {"max_new_tokens": 16, "do_sample": False})
    answer(question(kind, short), lambda piece: None)
    needs = answer.needs(question(kind, file))
    gc.collect()
    with peak_memory() as peak:
        reply = answer(question(kind, file), lambda piece: None)
    stated, measured = needs.memory / 1e6, peak[0] / 1e6
    facts = {"said": str(needs), "stated_mb": round(stated), "measured_mb": round(measured)}
    return {
        **facts,
        "ratio": round(measured / stated, 2),
        "tokens": reply.prompt_tokens,
        "seconds": round(reply.seconds, 1),
    }


def question(kind: str, file: str) -> list[dict[str, Any]]:
    item = {"type": "video", "path": file} if kind == "video" else {"type": "audio", "path": file}
    item |= {"encoder": "speech"} if kind == "speech" else {}
    return [{"role": "user", "content": [item, {"type": "text", "text": "What is said?"}]}]


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The most anonymous memory of this process beyond that at the beginning, in bytes, looked at every 5 ms."""
    start, peak, over = anonymous_memory(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], anonymous_memory() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


def anonymous_memory() -> int:
    """Without pages of files, which the system takes and gives as it likes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def write(file: Path, clip: np.ndarray, seconds: float) -> None:
    """A WAV file of a clip [samples], repeated, or a video (2 frames per second, 320 x 240) with it as sound track."""
    samples = np.resize(clip, round(seconds * RATE)).astype(np.float32)
    if file.suffix == ".wav":
        import soundfile

        soundfile.write(file, samples, RATE)
        return
    import av

    with av.open(str(file), "w") as container:
        pictures, sounds = container.add_stream("libx264", rate=2), container.add_stream("aac", rate=RATE)
        pictures.width, pictures.height, pictures.pix_fmt = 320, 240, "yuv420p"
        for index in range(round(seconds * 2)):
            level = np.full((240, 320, 3), index % 256, np.uint8)
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(level, format="rgb24")))
        container.mux(pictures.encode())
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = RATE
        container.mux(sounds.encode(frame))
        container.mux(sounds.encode())


def save_shape(name: str, folder: Path) -> Path:
    """A folder with a model of random weights whose speech tower has the shape of that name."""
    import tiny
    import tiny_media
    from transformers import WhisperConfig

    from unimoe import UniMoeForCausalLM
    from unimoe.processing.feature_extraction_unimoe import UniMoeFeatureExtractor

    width, layers, heads = SHAPES[name]
    processor = tiny_media.processor(
        "image video speech",
        video_tokens=4,
        speech_tokens=60,
        feature_extractor=UniMoeFeatureExtractor(speech=True, sound=False),
    )
    tower = WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        encoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_layers=1,
        decoder_attention_heads=heads,
        decoder_ffn_dim=width,
    )
    text = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 8192, "hidden_size": 256}
    text |= {"intermediate_size": 768, "eos_token_id": processor.tokenizer.eos_token_id}
    ids = {f"{kind}_token_id": getattr(processor, f"{kind}_token_id") for kind in ("image", "video", "audio", "sound")}
    connector = {"type": "mlp", "input_size": width, "output_size": 256, "num_tokens": 60}
    config = tiny.config(
        text,
        speech_config=tower,
        audio_config=None,
        sound_connector=None,
        speech_connector=connector,
        image_connector=tiny.connector(output_size=256),
        **ids,
    )
    UniMoeForCausalLM(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
