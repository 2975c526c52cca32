"""Loading models, as a log file sees it."""

from grao_lightning.language_model.loading import _silence_gguf


def test_no_bar_of_reading_gguf_reaches_a_log(monkeypatch, capsys):
    from transformers import modeling_gguf_pytorch_utils as reader

    monkeypatch.setattr(reader, "tqdm", reader.tqdm)  # undone behind the test
    assert list(reader.tqdm(range(3))) == [0, 1, 2]
    assert "3/3" in capsys.readouterr().err
    _silence_gguf()
    assert list(reader.tqdm(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""
