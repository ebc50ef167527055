"""docs/store-methods.md says of every public method what it does and which tests exercise it."""

from tests.unit.dropin import method_table


def test_the_page_is_what_code_and_tests_give() -> None:
    assert method_table.PAGE.read_text() == method_table.page(), "python -m tests.unit.dropin.method_table"


def test_every_method_is_exercised_by_a_test() -> None:
    bare = [name for name, files in method_table.calls().items() if not files]
    assert not bare
