"""Calibration text -> windows of token ids, to the token; and a sentence a fault."""

import hashlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tokenizer as make_tokenizer

from adamix.calibration.texts import token_hash, tokenize
from adamix.errors import CalibrationError

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def ids(text, tokenizer):
    return [BOS, *tokenizer.convert_tokens_to_ids(list(text)), EOS]


def flat(source, tokenizer, length=1000):
    """All ids in one window."""
    tokens = tokenize(source, tokenizer, sequences=50, length=length, seed=0)
    assert tokens.dtype == torch.int64 and tokens.shape[0] == 1
    return tokens[0].tolist()


def json_lines(path, *records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
                    encoding="utf-8")
    return path


def refused(source, tokenizer, *words):
    with pytest.raises(CalibrationError) as caught:
        tokenize(source, tokenizer, sequences=4, length=8, seed=0)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    for word in words:
        assert word in message


# --- sources -----------------------------------------------------------------------------------


def test_a_text_file_is_one_document(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text("one\n\ntwo\n")
    for source in (tmp_path / "t.txt", str(tmp_path / "t.txt")):
        assert flat(source, tokenizer) == ids("one\n\ntwo\n", tokenizer)


def test_a_list_is_a_document_a_string_each_with_begin_and_end(tokenizer):
    expected = ids("ab", tokenizer) + ids("c", tokenizer)
    assert flat(["ab", "", "c"], tokenizer) == expected  # an empty one adds nothing
    assert expected[:4] == [BOS, *tokenizer.convert_tokens_to_ids(["a", "b"]), EOS]


def test_json_lines_give_text_prompt_and_answer_and_messages(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}")
    chat = [{"role": "user", "content": "hi"}, {"role": "model", "content": "yo"}]
    path = json_lines(tmp_path / "c.jsonl", {"text": "first"}, {"prompt": "2+2=", "answer": " 4"},
                      {"messages": chat})
    with path.open("a") as file:
        file.write("\n   \n" + json.dumps({"text": "last"}))  # empty lines count for nothing
    assert flat(path, tokenizer) == (ids("first", tokenizer) + ids("2+2= 4", tokenizer)
                                     + ids("[user]hi;[model]yo;", tokenizer)
                                     + ids("last", tokenizer))


def test_a_chat_templates_begin_token_is_not_doubled(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    path = json_lines(tmp_path / "c.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
    assert flat(path, tokenizer) == ids("hi", tokenizer)


def test_a_line_ends_at_a_newline_alone(tmp_path, tokenizer):
    """JSON leaves U+2028, U+0085 and others as they are; str.splitlines would cut there."""
    path = json_lines(tmp_path / "c.jsonl", {"text": "a\u2028b\u0085c"}, {"text": "d"})
    first = ids("a b c", tokenizer)  # U+2028 and U+0085 are no tokens of this vocabulary
    first[2] = first[4] = tokenizer.unk_token_id
    assert flat(path, tokenizer) == first + ids("d", tokenizer)


def test_a_data_sets_text_column_is_read(monkeypatch, tokenizer):
    called = {}

    def load_dataset(name, **options):
        called.update(options, name=name)
        return iter([{"text": "ab"}, {"text": "c"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert flat("org/corpus", tokenizer) == ids("ab", tokenizer) + ids("c", tokenizer)
    assert called == {"name": "org/corpus", "split": "train", "streaming": True}


# --- windows -----------------------------------------------------------------------------------


def test_windows_follow_each_other_and_the_rest_is_left_out(tokenizer):
    text = "abcdefghijklmnopqrstu"  # with begin and end 23 tokens: five windows of four
    tokens = tokenize([text], tokenizer, sequences=50, length=4, seed=0)
    assert tokens.tolist() == torch.tensor(ids(text, tokenizer)[:20]).view(5, 4).tolist()


def test_the_seed_chooses_among_more_windows_than_are_asked_for(tokenizer):
    text = "".join(chr(97 + i % 26) + chr(65 + i // 26) for i in range(200))
    every = tokenize([text], tokenizer, sequences=1000, length=8, seed=0).tolist()
    chosen = [tokenize([text], tokenizer, sequences=6, length=8, seed=seed).tolist()
              for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    for windows in chosen:
        places = [every.index(window) for window in windows]
        assert len(windows) == 6 and places == sorted(set(places))  # each once, in order
    assert [every.index(w) for w in chosen[0]] != list(range(6))


def test_reading_stops_at_a_few_times_what_is_needed(tokenizer):
    def endless():
        while True:
            read.append("abcdefgh")
            yield read[-1]

    class Endless(list):
        def __iter__(self):
            return endless()

    read = []
    tokens = tokenize(Endless(), tokenizer, sequences=3, length=10, seed=0)
    assert tokens.shape == (3, 10) and 30 <= 10 * len(read) <= 1000


def test_a_text_shorter_than_a_window_is_one_shorter_window(tokenizer):
    tokens = tokenize(["abc"], tokenizer, sequences=4, length=64, seed=0)
    assert tokens.tolist() == [ids("abc", tokenizer)]


def test_the_hash_is_that_of_the_ids_as_int32():
    tokens = torch.tensor([[1, 2], [300, 4]])
    data = b"".join(i.to_bytes(4, "little") for i in (1, 2, 300, 4))
    assert token_hash(tokens) == hashlib.sha256(data).hexdigest()
    assert token_hash(tokens.T) != token_hash(tokens)


# --- faults ------------------------------------------------------------------------------------


def test_a_file_that_is_not_there_asks_for_datasets(monkeypatch, tmp_path, tokenizer):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(str(tmp_path / "nothing.txt"), tokenizer, "nothing.txt", "pip install datasets")


def test_a_data_set_that_is_not_there_is_named(monkeypatch, tokenizer):
    def load_dataset(name, **options):
        raise FileNotFoundError(f"no {name}\nand a second line")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    refused("org/nothing", tokenizer, "org/nothing")


@pytest.mark.parametrize("line", [
    '{"text": "x"', "[]", "7", '"text"', "{}", '{"prompt": "x"}', '{"answer": "x"}',
    '{"text": 5}', '{"text": null}', '{"prompt": 1, "answer": 2}', '{"messages": 5}'])
def test_a_line_that_is_none_is_named_by_its_number(tmp_path, tokenizer, line):
    path = tmp_path / "c.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    refused(path, tokenizer, "c.jsonl", "line 3")


@pytest.mark.parametrize("template", [None, "{{ raise_exception('roles must alternate') }}"])
def test_messages_that_the_template_does_not_take_name_their_line(tmp_path, template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    path = json_lines(tmp_path / "c.jsonl", {"messages": [{"role": "user", "content": "x"}]})
    refused(path, tokenizer, "line 1")


def test_a_file_that_is_no_text_is_named(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe\x00\x80")
    refused(tmp_path / "t.txt", tokenizer, "t.txt")


@pytest.mark.parametrize("source", [[], [""], ["", ""], "empty.txt", "empty.jsonl"], ids=str)
def test_a_source_without_text_is_refused(tmp_path, tokenizer, source):
    if isinstance(source, str):
        (tmp_path / source).write_text("")
        source = tmp_path / source
    refused(source, tokenizer, "no text")
