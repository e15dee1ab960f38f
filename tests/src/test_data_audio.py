"""Sound as mu-law bytes: the curve, wav files of every width, and the split by file."""

import wave

import numpy as np
import pytest

from hf_tfamily.data import load_data, mu_law_decode, mu_law_encode, write_wav
from hf_tfamily.data.audio import read_wav


def write_pcm(file, samples, width=2, rate=8000):
    """A wav file of samples [n, channels] in [-1, 1), written sample by sample."""
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(samples.shape[1])
        sound.setsampwidth(width)
        sound.setframerate(rate)
        for sample in samples.ravel():
            whole = int(np.floor(sample * 2 ** (8 * width - 1)))
            if width == 1:
                sound.writeframes(bytes([whole + 128]))
            else:
                sound.writeframes(whole.to_bytes(width, "little", signed=True))


def test_mu_law_is_the_textbook_curve():
    for sample in (-1.0, -0.3, -0.001, 0.0, 0.01, 0.5, 1.0):
        curve = np.sign(sample) * np.log(1 + 255 * abs(sample)) / np.log(256)
        assert mu_law_encode([sample]).tolist() == [int(np.floor((curve + 1) / 2 * 255 + 0.5))]
    assert mu_law_encode([-1.0, 0.0, 1.0]).tolist() == [0, 128, 255]


def test_mu_law_levels_come_back_exactly():
    levels = np.arange(256)
    samples = mu_law_decode(levels)
    assert (samples[0], samples[-1]) == (pytest.approx(-1), pytest.approx(1))
    assert (np.diff(samples) > 0).all()
    np.testing.assert_array_equal(mu_law_encode(samples), levels)


@pytest.mark.parametrize("samples", [[1.01], [-2.0], [np.nan]])
def test_mu_law_clips_nothing(samples):
    with pytest.raises(ValueError, match=r"must lie in \[-1, 1\]"):
        mu_law_encode(samples)


def test_mu_law_decodes_nothing_but_levels():
    with pytest.raises(ValueError, match="must lie in 0 to 255"):
        mu_law_decode([256])


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_files_of_every_width(tmp_path, width):
    samples = np.concatenate([[-1.0, -0.5, 0.0, 0.5], np.random.default_rng(0).uniform(-1, 1, 20)])[:, None]
    write_pcm(tmp_path / "a.wav", samples, width)
    read, rate = read_wav(tmp_path / "a.wav")
    assert rate == 8000
    np.testing.assert_allclose(read, samples[:, 0], atol=2.0 ** (1 - 8 * width))
    np.testing.assert_array_equal(read[:4], samples[:4, 0])


def test_channels_are_averaged(tmp_path):
    write_pcm(tmp_path / "a.wav", np.array([[0.5, 0.0], [-0.5, -0.25]]))
    assert read_wav(tmp_path / "a.wav")[0].tolist() == [0.25, -0.375]


def test_written_levels_are_read_again(tmp_path):
    levels = np.arange(256)
    write_wav(tmp_path / "a.wav", levels, 12000)
    samples, rate = read_wav(tmp_path / "a.wav")
    assert rate == 12000
    np.testing.assert_allclose(samples, mu_law_decode(levels), atol=1e-4)


@pytest.fixture
def music(tmp_path):
    """Three files of 25, 30 and 35 samples."""
    rng = np.random.default_rng(0)
    sounds = {name: rng.uniform(-1, 1, (count, 1)) for name, count in (("a", 25), ("b", 30), ("c", 35))}
    for name, samples in sounds.items():
        write_pcm(tmp_path / f"{name}.wav", samples)
    return {"source": "audio_files", "path": str(tmp_path), "length": 10}


def test_audio_files_are_split_by_file(music, tmp_path):
    data = load_data(music)
    assert (data.train.num_rows, data.eval.num_rows) == (2 + 3, 3)
    assert (data.vocab_size, data.dims, data.processor) == (257, 10, None)
    samples, _ = read_wav(tmp_path / "c.wav")
    ids = data.eval["input_ids"][:]
    assert set(ids[:, 0]) == {256}
    np.testing.assert_array_equal(ids[:, 1:].ravel(), mu_law_encode(samples[:30]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eval_files": 3}, "Found 3 files .* eval_files=3"),
        ({"eval_files": 0}, "at least one on each side"),
        ({"pattern": "*.flac"}, "Found 0 files"),
        ({"sample_rate": 12000}, "a.wav has 8000 samples a second, not 12000"),
        ({"length": 40}, "No training file holds length=40"),
        ({"length": 0}, "length must be at least 1"),
    ],
)
def test_audio_files_refuse_what_does_not_fit(music, change, message):
    with pytest.raises(ValueError, match=message):
        load_data({**music, **change})


def test_other_files_are_named(music, tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF no sound")
    with pytest.raises(ValueError, match=r"a\.wav is no wav file"):
        load_data(music)
