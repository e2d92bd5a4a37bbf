"""The tool that measures how a text is tokenised: its text, and what it counts."""

import measure_text


def test_a_text_has_the_size_that_was_asked_for_and_is_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        measure_text.write_text(tmp_path / name, 200_000)
    assert 200_000 <= (tmp_path / "a").stat().st_size < 210_000
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_second_measurement_finds_the_tokens_of_the_first(tmp_path, tiny_model):
    measure_text.write_text(tmp_path / "text.txt", 300_000)
    arguments = (tiny_model(L=1), tmp_path / "text.txt", tmp_path / "tokens", 1)
    first, second = (measure_text.measure(*arguments) for _ in range(2))
    assert (first["tokenised"], second["tokenised"]) == (True, False)
    assert first["fingerprint"] == second["fingerprint"]
    assert first["tokens"] == second["tokens"] > 100_000
    measure_text.forget([tmp_path / "text.txt"])
