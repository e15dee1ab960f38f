"""Sound as mu-law bytes: sound files in, windows of a fixed length out, each behind the start token 256.

Mu-law (ITU-T G.711's curve, here its continuous form with mu = 255) spends the 256 values on soft sounds first, so that
8 bits do for music.
"""

import re
import struct
import wave
from pathlib import Path

import numpy as np

from .sequences import TokenSequences, require, token_dataset, with_start

MU = 255
SOUND_START = 256
PCM, EXTENSIBLE = 0x0001, 0xFFFE  # kinds of wav file
ENDINGS = (".wav", ".flac", ".ogg", ".mp3")  # wav is read here, which says what is cut off; soundfile reads the others
KINDS = {0x0002: "ADPCM", 0x0003: "floating-point numbers", 0x0006: "A-law", 0x0007: "mu-law", 0x0055: "MP3"}
UNKNOWN_SIZES = (0xFFFFFFFF, 0x7FFFFFFF)  # of programs that write to a pipe: the samples go on to the end of the file


def mu_law_encode(samples: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1] -> the nearest of 256 levels, uint8; silence is 128."""
    samples = np.asarray(samples, np.float64)
    if samples.size and not np.abs(samples).max() <= 1:  # also refuses NaN
        raise ValueError(f"samples must lie in [-1, 1], got values from {samples.min()} to {samples.max()}.")
    compressed = np.sign(samples) * np.log1p(MU * np.abs(samples)) / np.log1p(MU)
    return np.floor((compressed + 1) / 2 * MU + 0.5).astype(np.uint8)


def mu_law_decode(levels: np.ndarray) -> np.ndarray:
    """Levels 0 ... 255 -> samples in [-1, 1], float64."""
    levels = np.asarray(levels)
    if levels.size and (levels.min() < 0 or levels.max() > MU):
        raise ValueError(f"levels must lie in 0 to {MU}, got values from {levels.min()} to {levels.max()}.")
    compressed = 2 * (levels.astype(np.float64) / MU) - 1
    return np.sign(compressed) * np.expm1(np.abs(compressed) * np.log1p(MU)) / MU


def audio_files(
    path: str, length: int = 65536, sample_rate: int | None = None, eval_files: int = 1, pattern: str | None = None
) -> TokenSequences:
    """The sound files of a folder (wav, flac, ogg, mp3) as mu-law bytes, split by file; channels are averaged to one.

    Everything is held in memory, two bytes a sample.

    Args:
        path: the folder.
        length: samples in an example; what does not fill a window at the end of a file is left out.
        sample_rate: samples a second that every file must have; that of the first file if None.
        eval_files: number of files to hold out, the last by name.
        pattern: which files of the folder to take, such as "**/*.wav"; all sound files if None. Capital and small
            letters are the same, so that a.WAV is one.
    """
    files = _files(path, pattern)
    if not 1 <= eval_files < len(files):
        raise ValueError(
            f"Found {len(files)} files {pattern or 'of ' + ', '.join(ENDINGS)!r} in {path!r}, of which "
            f"eval_files={eval_files} are to be held out; there must be at least one on each side."
        )
    sounds = [read_sound(file) for file in files]
    rate = sample_rate or sounds[0][1]
    for file, (_, own_rate) in zip(files, sounds):
        if own_rate != rate:
            raise ValueError(f"{file} has {own_rate} samples a second, not {rate}; resample it first.")
    windows = [_windows(samples, length) for samples, _ in sounds]
    return TokenSequences(
        train=_sound_dataset(windows[:-eval_files], length, "training"),
        eval=_sound_dataset(windows[-eval_files:], length, "held-out"),
        num_values=256,
        dims=length,
        sample_rate=rate,
        description=f"{len(files)} sound files of {path} at {rate} Hz in windows of {length} mu-law bytes; "
        f"held out: {', '.join(file.name for file in files[-eval_files:])}",
        licence="unknown",
    )


def _files(path: str, pattern: str | None) -> list[Path]:
    """The files that fit, in capital or small letters, sorted by name."""
    if pattern is None:
        return sorted(file for file in Path(path).rglob("*") if file.suffix.lower() in ENDINGS)
    either_case = re.sub("[a-zA-Z]", lambda letter: f"[{letter[0].lower()}{letter[0].upper()}]", pattern)
    return sorted(Path(path).glob(pattern if "[" in pattern else either_case))


def read_sound(file: str | Path) -> tuple[np.ndarray, int]:
    """Samples [n] in [-1, 1], the mean of the channels, and the number of them in a second.

    Raises ValueError, naming the file, where it cannot be read, and MissingPackageError where soundfile is missing.
    """
    if Path(file).suffix.lower() == ".wav":
        return read_wav(file)
    soundfile = require("soundfile")
    try:
        samples, rate = soundfile.read(str(file), always_2d=True)
    except soundfile.SoundFileError as error:
        raise ValueError(f"{file} is no sound file that can be read: {error}") from error
    return samples.mean(axis=1).clip(-1, 1), rate


def read_wav(file: str | Path) -> tuple[np.ndarray, int]:
    """Samples [n] in [-1, 1], the mean of the channels, and the number of them in a second.

    Plain wav files and those of WAVE_FORMAT_EXTENSIBLE, of whole numbers in 8 to 32 bits. Raises ValueError, naming the
    file, on other kinds and on what is cut off.
    """
    chunks = _chunks(Path(file).read_bytes(), file)
    if "fmt " not in chunks or "data" not in chunks or len(chunks["fmt "]) < 16:
        raise ValueError(f"{file} is no wav file of whole-number samples: its format or its samples are missing.")
    kind, channels, rate, _, frame, bits = struct.unpack("<HHIIHH", chunks["fmt "][:16])
    if kind == EXTENSIBLE and len(chunks["fmt "]) >= 26:
        kind = int.from_bytes(chunks["fmt "][24:26], "little")  # the first two bytes of the sub-format
    if kind != PCM:
        what = KINDS.get(kind, f"kind {kind:#06x}")
        raise ValueError(
            f"{file} is no wav file of whole-number samples but of {what}; make it one: "
            f"ffmpeg -i {file} -c:a pcm_s16le new.wav"
        )
    if not 8 <= bits <= 32 or not channels or not rate or frame != channels * -(-bits // 8):
        raise ValueError(
            f"{file} has samples of {bits} bits in frames of {frame} bytes for {channels} channels at {rate} Hz; "
            "8, 16, 24 and 32 bits can be read."
        )
    if len(chunks["data"]) % frame:
        raise ValueError(f"{file} is cut off: it ends inside a sample.")
    return _pcm_samples(chunks["data"], frame // channels, file).reshape(-1, channels).mean(axis=1), rate


def _chunks(content: bytes, file: str | Path) -> dict[str, bytes]:
    """The parts of a RIFF file up to the samples, by name.

    Raises ValueError if it is none, if it is shorter than it says, or if its parts do not fill it as it says.
    """
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise ValueError(f"{file} is no wav file of whole-number samples: it does not begin like one.")
    chunks, place = {}, 12
    while place + 8 <= len(content) and "data" not in chunks:
        name, size = struct.unpack("<4sI", content[place : place + 8])
        found = content[place + 8 : place + 8 + size]
        if len(found) < size and not (name == b"data" and size in UNKNOWN_SIZES):
            raise ValueError(
                f"{file} is cut off: its part {name.decode('latin-1')!r} should have {size:,} bytes and has "
                f"{len(found):,}."
            )
        chunks[name.decode("latin-1")] = found
        place += 8 + size + size % 2
    if "data" in chunks and size not in UNKNOWN_SIZES:
        _check_end(content, place, file)
    return chunks


def _check_end(content: bytes, place: int, file: str | Path) -> None:
    """What follows the samples, of a file that says its own size, is made of parts; else samples are cut off."""
    end = 8 + int.from_bytes(content[4:8], "little")
    if end not in (len(content), len(content) + 1):
        return
    while place + 8 <= end:
        size = int.from_bytes(content[place + 4 : place + 8], "little")
        place += 8 + size + size % 2
    if place < end - 1 or place > end + 1:  # some programs leave out the byte that makes sizes even
        raise ValueError(f"{file} contradicts itself: its parts do not end where it should, at byte {end:,}.")


def write_wav(file: str | Path, levels: np.ndarray, sample_rate: int) -> None:
    """Write mu-law levels [n] as a wav file of one channel and 16 bits."""
    samples = np.rint(mu_law_decode(levels) * 32767).astype("<i2")
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(sample_rate)
        sound.writeframes(samples.tobytes())


def _pcm_samples(content: bytes, width: int, file: str | Path) -> np.ndarray:
    """Samples of `width` bytes, little-endian, in [-1, 1)."""
    if not 1 <= width <= 4:
        raise ValueError(f"{file} has samples of {8 * width} bits; 8, 16, 24 and 32 can be read.")
    parts = np.frombuffer(content, np.uint8).reshape(-1, width)
    if width == 1:
        parts = parts ^ 0x80  # 8-bit wav files are unsigned
    return np.pad(parts, ((0, 0), (4 - width, 0))).view("<i4")[:, 0] / 2**31


def _windows(samples: np.ndarray, length: int) -> np.ndarray:
    """[n, length] mu-law levels, one window behind the other."""
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}.")
    count = len(samples) // length
    return mu_law_encode(samples[: count * length]).reshape(count, length)


def _sound_dataset(windows: list[np.ndarray], length: int, what: str):
    levels = np.concatenate(windows)
    if not len(levels):
        raise ValueError(f"No {what} file holds length={length} samples; choose a shorter length.")
    return token_dataset(with_start(levels, SOUND_START))
