"""The catalog: rows find their fields, and a batch is removed when nobody needs it, never before."""

import json
import threading
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mooncake.core.errors import CapacityError, PeerError, PeerGone, RequestError
from mooncake.dataproto_catalog import DataProtoCatalog, DataProtoCatalogTransfer
from mooncake.dropin.structured import catalog as catalogs
from mooncake.structured_object_store import MooncakeBundleTransfer, import_dataproto_ref
from tests.unit.dropin.test_structured import FakeStore, objects


def handle(number: int, fields="ab", rows: int = 2, partition: str = "p", **changes) -> dict:
    location = {"stage": "s", "section": "batch"}
    return {
        "type": "mooncake_dataproto_ref",
        "version": 1,
        "kind": "bundle_stages",
        "batch_size": rows,
        "namespace": "default",
        "partition": partition,
        "global_indexes": None,
        "stage_refs": {"s": {"manifest_key": f"bundle/{number}"}},
        "field_index": {name: {"member": f"batch.{name}", **location} for name in fields},
        "meta_info": {},
        "encoded_non_tensor": {},
        **changes,
    }


@pytest.fixture
def catalog() -> DataProtoCatalog:
    return DataProtoCatalog()


# ------------------------------------------------------------ publishing


def test_rows_are_resolved_in_the_order_asked_for_with_fields_grouped_by_place(catalog):
    catalog.publish("1", "p", ["x", "y"], tags=[{"t": 1}, {}], handle=handle(1, "ab"))
    catalog.publish("2", "p", ["y", "x"], tags=[{"u": 2}, {}], handle=handle(2, "c"))
    plan = catalog.resolve("p", ["y", "x"])
    assert plan["fields"] == ["a", "b", "c"]
    assert plan["tags"] == [{"u": 2}, {"t": 1}]
    assert plan["field_groups"] == [
        {"fields": ["a", "b"], "locations": [("bundle/1", 1), ("bundle/1", 0)]},
        {"fields": ["c"], "locations": [("bundle/2", 0), ("bundle/2", 1)]},
    ]
    assert plan["handles"]["bundle/2"]["field_index"].keys() == {"c"}
    assert catalog.list() == {"p": {"x": {"t": 1}, "y": {"u": 2}}}
    assert catalog.list("q") == {}


def test_the_same_operation_answers_the_same_and_changes_nothing(catalog):
    first = catalog.publish("1", "p", ["x", "y"], handle=handle(1))
    catalog.publish("2", "p", ["x", "y"], handle=handle(2))
    assert catalog.publish("1", "p", ["x", "y"], handle=handle(1)) == first
    assert list(catalog.resolve("p", ["x"])["handles"]) == ["bundle/2"]
    catalog.ack_publication("1")
    catalog.ack_publication("1")


def test_results_of_operations_are_bounded(catalog, monkeypatch):
    monkeypatch.setattr(catalogs, "PUBLICATIONS_MAX", 2)
    for number in range(4):
        catalog.publish(str(number), "p", ["x"], tags=[{"n": number}])
    assert catalog.publish("3", "p", ["x"], tags=[{"n": 0}])["tags"] == [{"n": 3}]
    assert catalog.publish("0", "p", ["x"], tags=[{"n": 9}])["tags"] == [{"n": 9}]


def test_what_is_returned_is_the_callers_own(catalog):
    given = handle(1, meta_info={"k": [1]})
    tags = [{"t": [1]}, {}]
    catalog.publish("1", "p", ["x", "y"], tags=tags, handle=given)
    plan = catalog.resolve("p", ["x"])
    for theirs in (given["meta_info"], plan["handles"]["bundle/1"]["meta_info"], plan["meta_info"]):
        theirs["k"].append(2)
    tags[0]["t"].append(2)
    plan["tags"][0]["t"].append(2)
    again = catalog.resolve("p", ["x"])
    assert (again["meta_info"], again["tags"]) == ({"k": [1]}, [{"t": [1]}])


@pytest.mark.parametrize(
    "call",
    [
        lambda it: it.publish("", "p", ["z"], tags=[{}]),
        lambda it: it.update("", ["z"], tags=[{}]),
        lambda it: it.update("p", [], tags=[]),
        lambda it: it.update("p", "z", tags=[{}]),
        lambda it: it.update("p", ["z", "z"], tags=[{}, {}]),
        lambda it: it.update("p", ["z", ""], tags=[{}, {}]),
        lambda it: it.update("p", ["z"]),
        lambda it: it.update("p", ["z"], tags=[{}, {}]),
        lambda it: it.update("p", ["z"], handle=handle(5)),
        lambda it: it.update("p", ["z", "w"], handle=handle(5, fields="")),
        lambda it: it.update("p", ["z", "w"], handle=handle(5, stage_refs={})),
        lambda it: it.update("p", ["z", "w"], handle=handle(1)),
        lambda it: it.publish("9", "p", ["z", "w"], handle=handle(1, "c")),
        lambda it: it.publish("9", "p", ["z", "w"], handle={"type": "x"}),
        lambda it: it.resolve("p", ["zz"]),
        lambda it: it.resolve("p", ["x"], ["zz"]),
        lambda it: it.resolve("p", ["x"], []),
        lambda it: it.resolve("p", ["bare"]),
        lambda it: it.list(""),
        lambda it: it.remove("p", []),
    ],
)
def test_a_call_that_makes_no_sense_is_refused_and_changes_nothing(catalog, call):
    catalog.publish("1", "p", ["x", "y"], handle=handle(1))
    catalog.update("p", ["bare"], tags=[{}])
    before = (catalog.list(), catalog.resolve("p", ["x", "y"]))
    with pytest.raises(ValueError):  # noqa: PT011 - many reasons
        call(catalog)
    assert (catalog.list(), catalog.resolve("p", ["x", "y"])) == before


def test_tags_that_are_no_mappings_are_refused(catalog):
    with pytest.raises(TypeError, match="mappings"):
        catalog.update("p", ["x"], tags=["t"])


def test_meta_info_that_contradict_each_other_are_refused(catalog):
    for number in (1, 2):
        name = "ab"[number - 1]
        catalog.publish(name, "p", ["x", "y"], handle=handle(number, name, meta_info={"k": number}))
    with pytest.raises(ValueError, match="conflicting"):
        catalog.resolve("p", ["x"], pin=True)
    assert catalog.resolve("p", ["x"], ["a"])["meta_info"] == {"k": 1}
    catalog.drain()


# ------------------------------------------------------------ appending


def test_an_append_replaces_the_handle_of_a_fragment(catalog):
    catalog.publish("1", "p", ["x", "y"], handle=handle(1, "a"))
    done = catalog.publish_append(
        "2", "bundle/1", "p", ["x", "y"], previous_handle=handle(1, "a"), handle=handle(1, "ab")
    )
    assert done["fields"] == ["a", "b"]
    assert catalog.resolve("p", ["y"], ["b"])["field_groups"] == [
        {"fields": ["b"], "locations": [("bundle/1", 1)]}
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"previous_handle": handle(1, "ab")}, "stale"),
        ({"fragment_id": "bundle/2"}, "stale"),
        ({"handle": handle(1, "b")}, "existing fields"),
        ({"handle": handle(1, "ab", partition="q")}, "identity"),
        ({"handle": handle(1, "ab", storage_group_id="g")}, "identity"),
        ({"keys": ["x"]}, "identity"),
        ({"keys": ["x", "zz"]}, "not found"),
        ({"keys": ["y", "x"]}, "is not row"),
    ],
)
def test_an_append_to_what_has_changed_is_rejected_for_good(catalog, changes, reason):
    catalog.publish("1", "p", ["x", "y"], handle=handle(1, "a"))
    right = {
        "fragment_id": "bundle/1",
        "partition": "p",
        "keys": ["x", "y"],
        "previous_handle": handle(1, "a"),
        "handle": handle(1, "ab"),
    }
    rejected = catalog.publish_append("2", **{**right, **changes})
    assert reason in rejected["append_rejected"]
    assert catalog.publish_append("2", **right) == rejected
    assert catalog.resolve("p", ["x"])["fields"] == ["a"]


# ------------------------------------------------------------ retiring


def test_a_fragment_retires_with_its_last_row_and_not_before(catalog):
    catalog.publish("1", "p", ["x", "y"], handle=handle(1))
    assert catalog.remove("p", ["x", "unknown"])["retired_handles"] == []
    retired = catalog.remove("p", ["y"])["retired_handles"]
    assert retired == [handle(1)]
    assert catalog.remove("q", ["y"])["retired_handles"] == retired
    with pytest.raises(ValueError, match="pending"):
        catalog.publish("2", "p", ["x", "y"], handle=handle(1))
    with pytest.raises(ValueError, match="mismatch"):
        catalog.ack_retired([handle(1, "c")])
    assert catalog.ack_retired(retired)["retired_handles"] == []
    assert catalog.list() == {}


def test_a_fragment_that_is_read_retires_when_its_last_read_ends(catalog):
    catalog.publish("1", "p", ["x", "y"], handle=handle(1))
    tokens = [catalog.resolve("p", ["x"], pin=True)["read_token"] for _ in range(2)]
    assert catalog.remove("p", ["x", "y"])["retired_handles"] == []
    assert catalog.release_read(tokens[0])["retired_handles"] == []
    assert catalog.release_read(tokens[0])["retired_handles"] == []
    assert catalog.release_read(tokens[1])["retired_handles"] == [handle(1)]


def test_what_was_not_published_by_a_transfer_is_not_retired(catalog):
    catalog.update("p", ["x", "y"], handle=handle(1))
    assert catalog.remove("p", ["x", "y"])["retired_handles"] == []


def test_reads_are_bounded(catalog, monkeypatch):
    monkeypatch.setattr(catalogs, "READS_MAX", 1)
    catalog.publish("1", "p", ["x", "y"], handle=handle(1))
    token = catalog.resolve("p", ["x"], pin=True)["read_token"]
    with pytest.raises(CapacityError):
        catalog.resolve("p", ["x"], pin=True)
    catalog.release_read(token)
    catalog.resolve("p", ["x"], pin=True)


def test_drain_retires_everything_and_ends_the_catalog(catalog):
    catalog.publish("1", "p", ["x", "y"], handle=handle(1))
    token = catalog.resolve("p", ["x"], pin=True)["read_token"]
    with pytest.raises(RequestError, match="active"):
        catalog.drain()
    catalog.release_read(token)
    assert catalog.drain()["retired_handles"] == [handle(1)]
    with pytest.raises(RequestError, match="drained"):
        catalog.publish("2", "p", ["x", "y"], handle=handle(2))
    assert "drained" in json.dumps(
        catalog.publish_append(
            "3", "bundle/1", "p", ["x", "y"], previous_handle=handle(1), handle=handle(1, "abc")
        )
    )


KEYS = ["x", "y", "z"]


class Retiring(RuleBasedStateMachine):
    """Whatever is done: a fragment that rows or readers need is there, and no other one is."""

    def __init__(self) -> None:
        super().__init__()
        self.catalog = DataProtoCatalog()
        self.count = 0
        self.rows: dict[str, dict[str, int]] = {}  # key -> field -> fragment
        self.reads: dict[int, set[int]] = {}
        self.retired: set[int] = set()
        self.known: set[int] = set()

    def needed(self) -> set[int]:
        used = {fragment for fields in self.rows.values() for fragment in fields.values()}
        return used.union(*self.reads.values())

    def see(self, result) -> None:
        self.retired |= self.known - self.needed()
        self.known &= self.needed()
        names = {next(iter(one["stage_refs"].values()))["manifest_key"] for one in result["retired_handles"]}
        assert names == {f"bundle/{number}" for number in self.retired}

    @rule(keys=st.permutations(KEYS), fields=st.sampled_from(["a", "b", "ab"]))
    def publish(self, keys, fields) -> None:
        self.count += 1
        self.known.add(self.count)
        result = self.catalog.publish(str(self.count), "p", keys[:2], handle=handle(self.count, fields))
        for key in keys[:2]:
            self.rows.setdefault(key, {}).update(dict.fromkeys(fields, self.count))
        self.see(result)

    @rule(keys=st.sets(st.sampled_from(KEYS), min_size=1))
    def remove(self, keys) -> None:
        result = self.catalog.remove("p", sorted(keys))
        for key in keys:
            self.rows.pop(key, None)
        self.see(result)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def read(self, data) -> None:
        key = data.draw(st.sampled_from(sorted(self.rows)))
        token = self.catalog.resolve("p", [key], pin=True)["read_token"]
        self.reads[token] = set(self.rows[key].values())

    @precondition(lambda self: self.reads)
    @rule(data=st.data())
    def release(self, data) -> None:
        token = data.draw(st.sampled_from(sorted(self.reads)))
        result = self.catalog.release_read(token)
        del self.reads[token]
        self.see(result)

    @precondition(lambda self: self.retired)
    @rule()
    def acknowledge(self) -> None:
        handles = self.catalog.ack_retired([])["retired_handles"]
        self.catalog.ack_retired(handles)
        self.retired.clear()

    @invariant()
    def rows_resolve_to_where_they_were_put(self) -> None:
        for key, fields in self.rows.items():
            places = self.catalog.resolve("p", [key])["field_groups"]
            found = {name: one["locations"][0][0] for one in places for name in one["fields"]}
            assert found == {name: f"bundle/{number}" for name, number in fields.items()}


TestRetiring = Retiring.TestCase
TestRetiring.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)


# ------------------------------------------------------------ with a store


class Link:
    """Calls a catalog as another process would; `failing`: methods whose next calls fail, before or after."""

    def __init__(self) -> None:
        self.catalog = DataProtoCatalog()
        self.failing: list[tuple[str, str]] = []

    def __call__(self, method, *args, **kwargs):
        for when in ("before", "after"):
            if (method, when) in self.failing:
                self.failing.remove((method, when))
                if when == "after":
                    getattr(self.catalog, method)(*args, **kwargs)
                raise PeerGone("the catalog's host")
        return getattr(self.catalog, method)(*args, **kwargs)


@pytest.fixture
def fake() -> FakeStore:
    return FakeStore()


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
def both(fake, link) -> DataProtoCatalogTransfer:
    return DataProtoCatalogTransfer(MooncakeBundleTransfer(fake), link)


def batch(**fields) -> dict:
    columns = {name: objects(list(values)) for name, values in fields.items()}
    return {"batch": {}, "non_tensor_batch": columns}


def read(both, keys, fields=None) -> dict:
    """Return rows of fields, as a user of the catalog reads them."""
    plan = both.resolve("p", keys, fields)
    values = {}
    for group in plan["field_groups"]:
        for name in group["fields"]:
            values[name] = [
                both.transfer.get(plan["handles"][one], fields=[name], rows=[row], type="dict")[name][0]
                for one, row in group["locations"]
            ]
    both.release_read(plan["read_token"])
    return values


def test_rows_are_put_appended_read_and_removed_with_their_objects(fake, both):
    both.put(batch(a="12"), partition="p", keys=["x", "y"], tags=[{"t": 1}, {}])
    plan = both.resolve("p", ["x", "y"])
    both.release_read(plan["read_token"])
    ((fragment, known),) = plan["handles"].items()
    both.append(fragment, known, batch(b="34"), partition="p", keys=["x", "y"], stage="later")
    assert read(both, ["y", "x"]) == {"a": ["2", "1"], "b": ["4", "3"]}
    both.put(None, partition="p", keys=["x"], tags=[{"t": 2}])
    assert both.list() == {"p": {"x": {"t": 2}, "y": {}}}
    both.remove("p", ["x"])
    assert fake.objects
    both.remove("p", ["y"])
    assert not fake.objects
    both.close()


def test_rows_that_are_put_again_free_the_objects_of_the_old(fake, both):
    both.put(batch(a="12"), partition="p", keys=["x", "y"])
    count = len(fake.objects)
    both.put(batch(a="34"), partition="p", keys=["x", "y"])
    assert len(fake.objects) == count
    assert read(both, ["x"]) == {"a": ["3"]}


def test_objects_that_are_read_stay_until_the_read_ends(fake, both):
    both.put(batch(a="12"), partition="p", keys=["x", "y"])
    plan = both.resolve("p", ["x"])
    both.remove("p", ["x", "y"])
    assert fake.objects
    both.release_read(plan["read_token"])
    assert not fake.objects


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_publication_whose_link_failed_once_is_tried_again(link, both, when):
    link.failing = [("publish", when)]
    both.put(batch(a="12"), partition="p", keys=["x", "y"])
    assert read(both, ["x", "y"]) == {"a": ["1", "2"]}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("finish", [lambda it: it.close(), lambda it: it.drain()])
def test_a_publication_without_an_answer_is_repeated_before_anything_else(fake, link, both, when, finish):
    link.failing = [("publish", when)] * 2
    with pytest.raises(PeerGone):
        both.put(batch(a="12"), partition="p", keys=["x", "y"])
    assert fake.objects
    finish(both)
    assert link.catalog.list() in ({"p": {"x": {}, "y": {}}}, {})
    both.remove("p", ["x", "y"])
    assert not fake.objects


def test_what_the_catalog_refuses_is_removed_from_the_store(fake, link, both):
    link.catalog.drain()
    with pytest.raises(RequestError, match="drained"):
        both.put(batch(a="12"), partition="p", keys=["x", "y"])
    assert not fake.objects


def test_an_append_that_came_too_late_is_removed_from_the_store(fake, link, both):
    both.put(batch(a="12"), partition="p", keys=["x", "y"])
    plan = both.resolve("p", ["x", "y"])
    ((fragment, known),) = plan["handles"].items()
    before = dict(fake.objects)
    arguments = {"partition": "p", "keys": ["x", "y"], "stage": "later"}

    def call(method, *args, **kwargs):
        if method == "publish_append":
            link.catalog.release_read(plan["read_token"])
            link.catalog.remove("p", ["x"])
        return link(method, *args, **kwargs)

    with pytest.raises(ValueError, match="not found"):
        DataProtoCatalogTransfer(both.transfer, call).append(fragment, known, batch(b="34"), **arguments)
    assert fake.objects == before
    with pytest.raises(ValueError, match="not found"):
        both.append(fragment, known, batch(b="34"), **arguments)


@pytest.mark.parametrize(
    "call",
    [
        lambda it: it.put(batch(a="12"), partition="p", keys=["x"]),
        lambda it: it.put(batch(a="12"), partition="", keys=["x", "y"]),
        lambda it: it.put(None, partition="p", keys=["x"]),
        lambda it: it.append("f", handle(1), batch(b="1"), partition="p", keys=["x", "y"], stage="s"),
        lambda it: it.append("f", handle(1), batch(b="12"), partition="q", keys=["x", "y"], stage="s"),
        lambda it: it.append("f", handle(1), batch(b="12"), partition="p", keys=["x", "y"], stage="s",
                             overwrite=True),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused_before_anything_is_stored(fake, both, call):
    with pytest.raises(ValueError):  # noqa: PT011 - many reasons
        call(both)
    assert not fake.objects


def test_a_batch_whose_meta_info_is_no_json_is_refused_and_not_left(fake, both):
    with pytest.raises(TypeError, match="JSON"):
        both.put({**batch(a="12"), "meta_info": {"x": object()}}, partition="p", keys=["x", "y"])
    assert not fake.objects


def test_objects_that_cannot_be_removed_are_removed_by_a_later_call(fake, both):
    both.put(batch(a="12"), partition="p", keys=["x", "y"])
    fake.is_exist = lambda key: -900
    both.remove("p", ["x", "y"])
    with pytest.raises(PeerError, match="drain again"):
        both.drain()
    assert fake.objects
    del fake.is_exist
    both.drain()
    assert not fake.objects


def test_a_removal_that_could_not_be_acknowledged_is_acknowledged_by_a_later_call(fake, link, both):
    both.put(batch(a="12"), partition="p", keys=["x", "y"])
    link.failing = [("ack_retired", "before"), ("ack_publication", "before")]
    both.remove("p", ["x", "y"])
    both.put(batch(a="12"), partition="p", keys=["x", "y"])
    assert link.catalog.ack_retired([])["retired_handles"] == []


def test_a_batch_may_be_anything_that_has_a_length_and_that_the_transfer_stores(link):
    stored = import_dataproto_ref(handle(1, rows=3))
    both = DataProtoCatalogTransfer(SimpleNamespace(put=lambda data, **options: stored), link)
    assert both.put([1, 2, 3], partition="p", keys=["x", "y", "z"])["fields"] == ["a", "b"]
    with pytest.raises(ValueError, match="does not match"):
        both.put([1, 2], partition="p", keys=["x", "y", "z"])


def test_results_are_released_with_what_was_made_of_them(both):
    released = []
    both.transfer = SimpleNamespace(release_result=released.append)
    output = SimpleNamespace()
    both.attach_results(output, ["r"])
    both.release_result(output)
    both.release_result(output)
    assert released == ["r"]


def test_a_catalog_may_be_used_by_several_threads(catalog):
    def publish(number: int) -> None:
        for step in range(10):
            catalog.publish(f"{number}-{step}", "p", ["x", "y"], handle=handle(number * 100 + step))
            catalog.release_read(catalog.resolve("p", ["x"], pin=True)["read_token"])

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(catalog.remove("p", ["x", "y"])["retired_handles"]) == 40
