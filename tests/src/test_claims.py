"""What single claims count, before they are judged."""

from hf_tfamily.claims.memorizing_memory import KINDS, kinds_of


def test_names_are_new_or_from_long_ago_or_near():
    text = b"Then Adam went. Then Adam came, and Eve; but Adam sat; " + b"x" * 9 + b"y Adam and Eve"
    kinds = kinds_of(text, stream_bytes=1000, near=30)
    new, eve = text.index(b"Adam"), text.index(b"Eve")
    assert kinds[new : new + 4].tolist() == [KINDS["new_names"]] * 4
    assert kinds[eve : eve + 3].tolist() == [KINDS["new_names"]] * 3
    assert set(kinds[text.index(b"Then", 3) : eve]) == {KINDS["other"]}  # a beginning, and a name from a moment ago
    assert kinds[-3:].tolist() == [KINDS["names"]] * 3
    assert (kinds == KINDS["names"]).sum() == 3
    apart = kinds_of(text, stream_bytes=len(text) - 20, near=30)
    assert apart[-3:].tolist() == [KINDS["new_names"]] * 3  # a stream of its own
