import json
import random
import re
from itertools import islice

import pytest

from jaxcodec.demo.exercises import exercises
from jaxcodec.demo.records import HELDOUT_PERIOD, make_record, read_record
from jaxcodec.demo.tasks import (
    AGENTS,
    STOP,
    Story,
    check,
    make_story,
    read_story,
    stories,
    tag,
    write_examples,
)


@pytest.fixture(scope="module")
def some_stories() -> list[Story]:
    return list(islice(stories(0, "train"), 300))


def test_text_alone_states_every_fact(some_stories):
    for story in some_stories:
        record = read_record(story.record.text)
        assert (len(record.entries), len(record.names)) == (6, 3)
        stated = re.findall(r"(\d+) (\w+)", story.record.text)
        for entry in record.entries:
            assert (str(entry.quantity), entry.item) in stated


def test_story_is_recovered_from_the_context_of_every_turn(some_stories):
    for story in some_stories:
        for agent in AGENTS:
            assert read_story(story.prompt(agent)) == story


def test_every_turn_continues_the_one_before(some_stories):
    for story in some_stories:
        context = story.opening
        for agent in AGENTS:
            context += tag(agent)
            assert story.prompt(agent) == context
            context += story.completion(agent)


def test_completions_end_with_the_only_stop(some_stories):
    for story in some_stories:
        for agent in AGENTS:
            assert story.completion(agent).index(STOP) == len(story.completion(agent)) - 1


def test_extracted_facts_stand_in_the_record(some_stories):
    for story in some_stories:
        for fact in story.completion("extract").rstrip().split("; "):
            *who, what, number = fact.split(" ")
            assert f"{number} {'coins' if what == 'price' else what}" in story.record.text
            assert not who or who[0] in story.question


def test_computed_steps_are_true_and_lead_to_the_total(some_stories):
    for story in some_stories:
        *steps, total = story.completion("compute").rstrip().split("; ")
        for step in steps:
            left, right = step.split(" = ")
            a, sign, b = left.split(" ")
            assert (int(a) * int(b) if sign == "*" else int(a) + int(b)) == int(right)
        assert total == f"total {steps[-1].split(' = ')[1]}"


def test_formatted_line_is_json_with_the_questions_words(some_stories):
    for story in some_stories:
        answer = json.loads(story.completion("format"))
        assert list(answer) == ["who", "what", "total"]
        assert answer["who"] in story.question
        assert answer["what"].removeprefix("coins for ") in story.question
        assert f"total {answer['total']}\n" in story.prompt("format")


def test_all_four_kinds_of_question_are_as_frequent():
    rng = random.Random(0)
    asked = [make_story(rng, make_record(rng)) for _ in range(1000)]
    kinds = [(story.costs, len(story.names), len(story.items)) for story in asked]
    assert set(kinds) == {(True, 1, 1), (False, 1, 2), (False, 2, 1), (False, 3, 1)}
    assert all(200 < kinds.count(kind) < 300 for kind in set(kinds))


def test_check_accepts_the_answer_alone(some_stories):
    for story, other in zip(some_stories, some_stories[1:], strict=False):
        for agent in AGENTS:
            prompt, completion = story.prompt(agent), story.completion(agent)
            assert check(prompt, completion)
            assert check(prompt, completion.rstrip(STOP))
            assert not check(prompt, completion.rstrip(STOP) + "0")
            assert not check(prompt, other.completion(agent))


def test_check_holds_an_agent_to_the_record_whatever_was_extracted():
    story = next(stories(0, "train"))
    mistaken = story.prompt("compute").replace(story.completion("extract"), "Tom bells 3\n")
    assert check(mistaken, story.completion("compute"))


def test_check_refuses_a_context_without_a_turn():
    story = next(stories(0, "train"))
    with pytest.raises(ValueError, match="append tag"):
        check(story.opening, story.completion("extract"))


@pytest.mark.parametrize("context", ["", "No record\nQuestion: How many?\n"])
def test_text_that_is_no_record_is_refused(context):
    with pytest.raises(ValueError, match="Expected a record"):
        read_story(context)


def test_question_about_nobody_is_refused():
    record = next(stories(0, "train")).record
    with pytest.raises(ValueError, match="Expected a question"):
        read_story(f"{record.text}\nQuestion: How many?\n")


def test_unknown_agent_is_refused():
    with pytest.raises(ValueError, match="extract, compute, format"):
        next(stories(0, "train")).prompt("summarize")


def test_stories_depend_on_seed_and_split_alone():
    first, again = (list(islice(stories(7, "heldout"), 5)) for _ in range(2))
    assert first == again
    assert first != list(islice(stories(8, "heldout"), 5))


def test_split_follows_the_facts_not_the_phrasing():
    record = next(stories(0, "heldout")).record
    heading, body = record.text.split(": ", maxsplit=1)
    assert read_record(f"Order 1, Sunday: {body}").split == "heldout"
    backwards = ". ".join(reversed(body.removesuffix(".").split(". "))) + "."
    assert read_record(f"{heading}: {backwards}").split == "heldout"


def test_one_record_in_a_period_is_held_out():
    rng = random.Random(0)
    held_out = sum(make_record(rng).split == "heldout" for _ in range(2000))
    assert abs(held_out - 2000 / HELDOUT_PERIOD) < 40  # 3.7 standard deviations


def test_files_of_the_agents_tell_the_same_stories(tmp_path):
    write_examples(tmp_path, "heldout", 4, seed=3)
    expected = list(islice(stories(3, "heldout"), 4))
    for agent in AGENTS:
        lines = (tmp_path / f"{agent}.heldout.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [
            {"prompt": s.prompt(agent), "completion": s.completion(agent)} for s in expected
        ]


def test_exercises_give_no_agents_turn_away():
    for text in islice(exercises(0), 1000):
        assert "###" not in text
        assert '{"who"' not in text
        assert "; " not in text


def test_exercises_come_from_the_training_split_and_compute_rightly():
    texts = list(islice(exercises(0), 500))
    records = [read_record(text.split("\n")[0]) for text in texts if text.startswith("Order ")]
    assert {record.split for record in records} == {"train"}
    for a, sign, b, c in re.findall(r"(?<![+*] )\b(\d+) ([+*]) (\d+) = (\d+)", "\n".join(texts)):
        assert (int(a) * int(b) if sign == "*" else int(a) + int(b)) == int(c)
