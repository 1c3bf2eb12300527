"""Questions from files and from TFDS, their windows, answers and scores."""

import dataclasses
import gzip
import json
import lzma

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_jax.data import (
    QUESTION_FIELDS,
    Answer,
    DataError,
    Question,
    SquadFeatures,
    WordPiece,
    best_answers,
    cached_features,
    eval_batches,
    exact_match,
    f1,
    load_questions,
    make_features,
    ranked_answers,
    read_questions,
    score,
    squad,
)
from qat_jax.data.squad_metrics import normalise_answer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LONG = {"length": 99, "stride": 20}
PIECES = ["a", "b", "c", "ab", "##a", "##b", "##c", "1", "##2", "."]


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(SPECIAL + PIECES))
    return WordPiece(path)


def asked(context, answer=None, question="a b", name="q"):
    answers = () if answer is None else (Answer(answer, context.index(answer)),)
    return Question(name, question, context, answers, is_impossible=answer is None)


def file_of(*questions):
    paragraphs = [
        {
            "context": question.context,
            "qas": [
                {
                    "id": question.id,
                    "question": question.question,
                    "answers": [
                        {"text": answer.text, "answer_start": answer.start}
                        for answer in question.answers
                    ],
                    "is_impossible": question.is_impossible,
                }
            ],
        }
        for question in questions
    ]
    return json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]})


@pytest.mark.parametrize(
    ("suffix", "compress"), [("", bytes), (".xz", lzma.compress), (".gz", gzip.compress)]
)
def test_files_are_read_as_they_are_packed(tmp_path, suffix, compress):
    questions = [asked("é b.", "b"), asked("c", None, name="r")]
    path = tmp_path / f"x.json{suffix}"
    path.write_bytes(compress(file_of(*questions).encode()))
    assert load_questions("squad_json", path.name, tmp_path) == questions


@pytest.mark.parametrize(
    ("slice_", "kept"), [("[:2]", "abc"[:2]), ("[::2]", "ac"), ("[-1:]", "c"), ("[1:2:]", "b")]
)
def test_a_part_of_a_files_questions_is_named_as_a_slice(tmp_path, slice_, kept):
    questions = [asked(text, text, name=text) for text in "abc"]
    (tmp_path / "x.json").write_text(file_of(*questions))
    found = load_questions("squad_json", f"x.json{slice_}", tmp_path)
    assert "".join(question.id for question in found) == kept


@pytest.mark.parametrize("slice_", ["[3:]", "[::0]"])
def test_an_empty_slice_is_refused(tmp_path, slice_):
    (tmp_path / "x.json").write_text(file_of(asked("a", "a")))
    with pytest.raises(DataError, match=r"choose another slice, such as x.json\[:100\]"):
        load_questions("squad_json", f"x.json{slice_}", tmp_path)


def test_examples_of_tfds_are_the_same_questions():
    example = {
        "id": b"q",
        "title": b"t",
        "question": b"a b",
        "context": "é b.".encode(),
        "answers": {"text": np.array([b"b"], object), "answer_start": np.array([2], np.int32)},
    }
    assert squad._of_tfds(example) == asked("é b.", "b")
    empty = {"text": np.array([], object), "answer_start": np.array([], np.int32)}
    example |= {"answers": empty, "is_impossible": True}
    assert squad._of_tfds(example) == asked("é b.")


def test_sets_of_tfds_are_opened_by_name(monkeypatch):
    opened = []

    def load_source(*arguments):
        opened.append(arguments)
        answers = {"text": [b"b"], "answer_start": [2]}
        return [{"id": b"q", "question": b"a b", "context": b"a b", "answers": answers}]

    monkeypatch.setattr(squad, "load_source", load_source)
    assert load_questions("squad/v2.0", "train[:1]", "folder") == [asked("a b", "b")]
    assert opened == [("squad/v2.0", "train[:1]", "folder")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "not in SQuAD's format: something has no 'data'"),
        ('{"data": [{}]}', "no 'paragraphs'"),
        ('{"data": []}', "has no question"),
        ("[1", "cannot be read"),
        ("[1]", "cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_questions(tmp_path / "x.json")
    (tmp_path / "x.xz").write_text(content)
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(tmp_path / "x.xz")


def test_a_damaged_byte_of_a_packed_file_is_named(tmp_path):
    raw = gzip.compress(file_of(asked("a b", "b")).encode(), mtime=0)
    for at in range(10, len(raw)):  # after the header, of which some says nothing
        damaged = raw[:at] + bytes([raw[at] ^ 0xFF]) + raw[at + 1 :]
        (tmp_path / "x.gz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"x\.gz cannot be read"):
            read_questions(tmp_path / "x.gz")


def test_a_token_may_be_a_character_that_ends_lines_elsewhere(tmp_path):
    tokens = [*SPECIAL, "a", "\u2028", "\x85", "b"]
    for end in ("", "\n"):
        (tmp_path / "vocab.txt").write_bytes(("\n".join(tokens) + end).encode())
        ((numbers, _),) = WordPiece(tmp_path / "vocab.txt").encode(["a b"])
        assert numbers.tolist() == [4, 7]


def test_files_and_vocabularies_have_to_be_there(tmp_path):
    with pytest.raises(DataError, match="name one of SQuAD's JSON files"):
        read_questions(tmp_path / "x.json")
    with pytest.raises(DataError, match="pass --config"):
        load_questions("squad_json", "x.json")
    with pytest.raises(DataError, match="no vocabulary at"):
        WordPiece(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[CLS]\n")
    with pytest.raises(DataError, match=r"it has no \[UNK\], \[SEP\]"):
        WordPiece(tmp_path / "vocab.txt")


def test_windows_of_a_context_that_is_too_long(wordpiece):
    # Six tokens of context, three of them in a window, two from one window to the next.
    question = asked("a b c a b c", "b c")
    windows = make_features([question], wordpiece, length=8, stride=2, max_question_length=2)
    names = [*SPECIAL, *PIECES]
    written = [" ".join(names[token] for token in row) for row in windows.tokens]
    assert written == [
        "[CLS] a b [SEP] a b c [SEP]",
        "[CLS] a b [SEP] c a b [SEP]",
        "[CLS] a b [SEP] b c [SEP] [PAD]",
    ]
    assert windows.lengths.tolist() == [8, 8, 7]
    assert list(zip(windows.start, windows.end, strict=True)) == [(5, 6), (0, 0), (0, 0)]
    assert (windows[0]["start"], windows[0]["end"]) == (5, 6)
    last = windows[2]
    assert last["token_types"].tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
    assert last["token_mask"].tolist() == [True] * 7 + [False]
    assert windows.offsets[2].tolist() == [[-1, -1]] * 4 + [[8, 9], [10, 11]] + [[-1, -1]] * 2


def test_an_answer_inside_a_token_is_the_token(wordpiece):
    windows = make_features([Question("q", "a", "c 12 a", (Answer("2", 3),))], wordpiece, **LONG)
    assert windows.offsets[0, windows.start[0]].tolist() == [3, 4]
    assert windows.end[0] == windows.start[0]
    windows = make_features([Question("q", "a", "c ab", (Answer("b", 3),))], wordpiece, **LONG)
    assert windows.offsets[0, windows.start[0]].tolist() == [2, 4]


def test_windows_need_room_for_a_context(wordpiece):
    with pytest.raises(ValueError, match="stride 3 must be at least 1 and no more than that"):
        make_features([asked("a", "a")], wordpiece, length=7, stride=3, max_question_length=2)


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([*"abc1", "ab", "a12", "éB", ".", "ü"]), min_size=0, max_size=30),
    st.lists(st.sampled_from("abc"), min_size=1, max_size=9),
    st.integers(8, 20),
    st.integers(1, 4),
    st.data(),
)
def test_windows_hold_every_token_of_the_context(wordpiece, words, query, length, stride, data):
    context = " ".join(words)
    start = data.draw(st.integers(0, max(len(words) - 1, 0)))
    answers = ()
    if words:
        count = data.draw(st.integers(1, 3))
        text = " ".join(words[start : start + count])
        answers = (Answer(text, len(" ".join([*words[:start], ""]))),)
    question = Question("q", " ".join(query), context, answers)
    windows = make_features(
        [question], wordpiece, length=length, stride=stride, max_question_length=length - 7
    )
    (encoded, offsets), (kept, _) = wordpiece.encode([context, question.question])
    kept = kept[: length - 7]
    seen = []
    for row in range(len(windows)):
        tokens, first = windows.tokens[row], windows.context_start[row]
        past = windows.lengths[row] - 1
        assert tokens[0] == wordpiece.cls
        np.testing.assert_array_equal(tokens[1 : first - 1], kept)
        assert tokens[first - 1] == tokens[past] == wordpiece.sep
        assert (tokens[past + 1 :] == wordpiece.padding).all()
        at = [tuple(span) for span in windows.offsets[row, first:past]]
        numbers = [[tuple(span) for span in offsets].index(span) for span in at]
        np.testing.assert_array_equal(encoded[numbers], tokens[first:past])
        seen.extend(numbers)
        answer = context[
            windows.offsets[row, windows.start[row], 0] : windows.offsets[row, windows.end[row], 1]
        ]
        assert windows.start[row] == 0 or answer == answers[0].text
    assert set(seen) == set(range(len(encoded)))


def test_windows_are_kept_for_the_next_time(wordpiece, tmp_path, monkeypatch):
    questions = [asked("a b c", "b"), asked("c c", "c", name="r")]
    first = cached_features(questions, wordpiece, tmp_path / "new", **LONG)
    (path,) = (tmp_path / "new").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("qat_jax.data.squad_features.make_features", None)
        same(cached_features(questions, wordpiece, tmp_path / "new", **LONG), first)
    path.write_bytes(path.read_bytes()[:-30])
    same(cached_features(questions, wordpiece, tmp_path / "new", **LONG), first)
    cached_features(questions, wordpiece, tmp_path / "new", length=98, stride=20)
    cached_features(questions[:1], wordpiece, tmp_path / "new", **LONG)
    assert len(list((tmp_path / "new").iterdir())) == 3


def test_every_setting_makes_a_file_of_its_own(tmp_path):
    questions = [asked("a B", "B")]
    for name, tokens in (("one.txt", ["a", "b"]), ("two.txt", ["b", "a"])):
        (tmp_path / name).write_text("\n".join([*SPECIAL, *tokens]))
    one_path = tmp_path / "one.txt"
    one, two = WordPiece(one_path), WordPiece(tmp_path / "two.txt")
    folder = tmp_path / "cache"
    makers = [
        lambda: cached_features(questions, one, folder, length=384),
        lambda: cached_features(questions, two, folder),
        lambda: cached_features(questions, WordPiece(one_path, lowercase=False), folder),
        lambda: cached_features(questions, one, folder, stride=127),
        lambda: cached_features(questions, one, folder, max_question_length=63),
        lambda: cached_features([asked("a B", "a")], one, folder),
    ]
    for count, make in enumerate(makers, start=1):
        make()
        assert len(list(folder.iterdir())) == count
    cached_features(questions, one, folder, stride=128)  # says what the first one left unsaid
    assert len(list(folder.iterdir())) == len(makers)


def test_a_damaged_file_is_made_again(wordpiece, tmp_path):
    questions = [asked("a b c", "b")]
    first = cached_features(questions, wordpiece, tmp_path, **LONG)
    (path,) = tmp_path.iterdir()
    raw = path.read_bytes()
    for at in range(0, len(raw), 7):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0xFF]) + raw[at + 1 :])
        same(cached_features(questions, wordpiece, tmp_path, **LONG), first)
    assert list(tmp_path.iterdir()) == [path]


def test_an_end_in_the_middle_leaves_nothing(wordpiece, tmp_path, monkeypatch):
    def stop(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", stop)
    with pytest.raises(KeyboardInterrupt):
        cached_features([asked("a", "a")], wordpiece, tmp_path, **LONG)
    assert not list(tmp_path.iterdir())


def test_others_may_read_what_is_kept_if_they_may_read_files(wordpiece, tmp_path):
    (tmp_path / "plain").touch()
    cached_features([asked("a", "a")], wordpiece, tmp_path / "new", **LONG)
    (path,) = (tmp_path / "new").iterdir()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def same(ours, theirs):
    for field in dataclasses.fields(SquadFeatures):
        np.testing.assert_array_equal(getattr(ours, field.name), getattr(theirs, field.name))


def test_batches_have_the_fields_of_the_model(wordpiece):
    source = make_features([asked("a b c", "b")] * 3, wordpiece, **LONG)
    fields = ("tokens", "token_mask", "start")
    batches = list(eval_batches(source, batch_size=2, fields=fields))
    assert set(batches[0]) == {*fields, "mask"}
    assert batches[1]["mask"].tolist() == [True, False]
    assert batches[0]["tokens"].shape == (2, 99)
    assert batches[0]["start"].dtype == np.int32


def test_many_windows_at_once_are_each_of_them(wordpiece):
    source = make_features([asked("a b c", "b"), asked("c", "c", name="r")], wordpiece, **LONG)
    for ours, theirs in zip(source.__getitems__([1, 0, 1]), [1, 0, 1], strict=True):
        assert list(ours) == list(QUESTION_FIELDS)
        for name, value in source[theirs].items():
            np.testing.assert_array_equal(ours[name], value)
            assert ours[name].dtype == value.dtype


def test_cut_windows_are_read_as_far_as_they_go(wordpiece):
    source = make_features([asked("a b c", "b"), asked("c", "c", name="r")], wordpiece, **LONG)
    longest = source.lengths.max()
    short = source.cut(longest)
    for index in range(2):
        for name, value in source[index].items():
            whole = np.asarray(value)
            expected = whole if whole.ndim == 0 else whole[:longest]
            np.testing.assert_array_equal(short[index][name], expected)
    same(source.cut(1000), source)


def test_windows_by_length_keep_their_questions_and_answers(wordpiece):
    questions = [
        asked(context, "c", name=context) for context in ("c", "a b c", "a c", "b b b b c")
    ]
    source = make_features(questions, wordpiece, **LONG)
    ordered = source.by_length()
    assert ordered.lengths.tolist() == sorted(source.lengths.tolist(), reverse=True)
    assert ordered.question_index.tolist() == [3, 1, 2, 0]
    logits = np.random.default_rng(0).normal(size=(*source.tokens.shape, 2))
    answers = best_answers(source, logits, null_threshold=0.0)
    order = np.argsort(-source.lengths, kind="stable")
    shorter = logits[order][:, : source.lengths.max()]  # as a model gives them to shorter batches
    assert best_answers(ordered, logits[order], null_threshold=0.0) == answers
    assert best_answers(ordered, shorter, null_threshold=0.0) == answers


def test_ranked_answers_are_those_of_a_plain_search(wordpiece):
    questions = [asked("a b c a b c", "b c"), asked("c 12 .", "12", name="r")]
    windows = make_features(questions, wordpiece, length=9, stride=2, max_question_length=2)
    logits = np.random.default_rng(0).normal(size=(*windows.tokens.shape, 2))
    ranked = ranked_answers(windows, logits, n_best=9, max_answer_tokens=2)
    for index, question in enumerate(questions):
        best = {}
        for row in np.flatnonzero(windows.question_index == index):
            for start in range(9):
                for end in range(start, min(start + 2, 9)):
                    if min(windows.offsets[row, [start, end], 0]) < 0:
                        continue
                    span = windows.offsets[row, start, 0], windows.offsets[row, end, 1]
                    value = logits[row, start, 0] + logits[row, end, 1]
                    best[span] = max(value, best.get(span, -np.inf))
        expected = sorted(best.items(), key=lambda item: -item[1])[:9]
        found = ranked[question.id]
        texts = [question.context[first:past] for (first, past), _ in expected]
        assert [answer.text for answer in found] == texts
        assert [answer.start for answer in found] == [first for (first, _), _ in expected]
        np.testing.assert_allclose([answer.score for answer in found], [v for _, v in expected])
        assert sum(answer.probability for answer in found) == pytest.approx(1)
    assert best_answers(windows, logits, max_answer_tokens=2)["q"] == ranked["q"][0].text


def test_no_answer_where_the_cls_beats_every_span(wordpiece):
    question = asked("a b c a b c")
    windows = make_features([question], wordpiece, length=8, stride=2, max_question_length=2)
    logits = np.zeros((*windows.tokens.shape, 2))
    logits[:, 0] = [[2.0, 2.0], [0.5, 0.5], [3.0, 3.0]]  # the least counts: 1
    logits[1, 4] = [0.3, 0.3]
    assert best_answers(windows, logits) == {"q": "c"}
    assert best_answers(windows, logits, null_threshold=0.5) == {"q": "c"}
    assert best_answers(windows, logits, null_threshold=0.3) == {"q": ""}


def test_a_context_without_tokens_has_no_answer(wordpiece):
    windows = make_features([asked("")], wordpiece, **LONG)
    logits = np.zeros((1, 99, 2))
    assert best_answers(windows, logits, null_threshold=0.0) == {"q": ""}


def test_scores_by_hand():
    assert normalise_answer(" The Cat's  hat, an (A)nt! ") == "cats hat ant"
    assert exact_match("The Rome!", ["Paris", "rome"]) == 1.0
    assert f1("in the old town of Rome", ["Rome", "old Rome"]) == pytest.approx(2 * 2 / (5 + 2))
    assert f1("Paris", ["Rome"]) == 0.0
    assert (f1("", [""]), f1("x", [""]), f1("the", ["Rome"])) == (1.0, 0.0, 0.0)

    questions = [asked("c b", "c b"), asked("c", None, name="r"), asked("b", "b", name="s")]
    scores = score({"q": "b", "r": ""}, questions)
    assert scores == {"exact_match": 1 / 3, "f1": pytest.approx(5 / 9), "count": 3}
    with pytest.raises(ValueError, match="no question"):
        score({}, [])
    vacuous = Question("q", "a", ". b", (Answer(".", 0), Answer("b", 2)))
    assert score({"q": "the"}, [vacuous])["exact_match"] == 0  # "." does not count as an answer
    assert score({"q": "b"}, [vacuous])["exact_match"] == 1


def test_right_logits_give_right_answers_on_real_questions(shared_data, tmp_path):
    """But for answers that are parts of tokens: "gold" in "golden"."""
    path = shared_data / "squad" / "squad-v1.1-small-eval.json.xz"
    if not path.is_file():
        pytest.skip(f"no questions at {path}")
    questions = read_questions(path)
    assert len(questions) == 2485
    words = {word for q in questions for word in normalise_answer(q.context + q.question).split()}
    letters = {letter for q in questions for letter in (q.context + q.question).lower()}
    pieces = sorted(words | letters | {f"##{letter}" for letter in letters} - set(SPECIAL))
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, *(p for p in pieces if p.strip())]))
    windows = make_features(questions, WordPiece(tmp_path / "vocab.txt"), length=256)
    logits = np.zeros((*windows.tokens.shape, 2))
    (right,) = np.nonzero(windows.start)
    logits[right, windows.start[right], 0] = logits[right, windows.end[right], 1] = 9
    predictions = best_answers(windows, logits, max_answer_tokens=200)
    firsts = {question.id: question.answers[0].text for question in questions}
    wrong = [name for name, text in firsts.items() if predictions[name] != text]
    assert all(firsts[name] in predictions[name] for name in wrong)
    assert 0 < len(wrong) < 0.01 * len(questions)
    assert score(predictions, questions)["f1"] > 0.99
