"""The sample data, and the toy that reads any text."""

from grao_lightning.embedded.base import phrase_tokenizer
from grao_lightning.embedded.phrases import phrase_rows


def test_the_splits_share_no_question_and_every_row_has_an_answer():
    splits = [phrase_rows(split) for split in ("train", "validation")]
    assert [len(rows) for rows in splits] == [40, 12]
    questions = [{row["prompt"] for row in rows} for rows in splits]
    assert not questions[0] & questions[1]
    assert all(row["completion"] for rows in splits for row in rows)


def test_the_tokenizer_reads_any_text_and_gives_it_back():
    tokenizer = phrase_tokenizer()
    assert len(tokenizer) == 512
    for text in ("How do I boil an egg?", "Größe, 漢字 & 🥚\n\ttabs  two spaces", "x" * 50):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.all_special_ids)
