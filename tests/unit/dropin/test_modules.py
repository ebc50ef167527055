"""docs/store-modules.md is true: what it calls here can be imported, what it calls left out says why."""

import importlib
import importlib.util
import re
import subprocess
import sys

import pytest

import mooncake
from mooncake.core.errors import RequestError
from mooncake.dropin.left_out import REASONS
from mooncake.store import MooncakeDistributedNoFRegister, _get_pyclient_from_wrapper
from tests.unit.dropin.module_table import PAGE, ROWS, UPSTREAM, Row, covered, names, table

HERE = [row for row in ROWS if row.here]
GONE = sorted({row.module.partition(".")[0] for row in ROWS} - {row.module for row in HERE})


def test_the_page_has_the_table() -> None:
    assert f"\n{table()}\n" in PAGE.read_text(), "python -m tests.unit.dropin.module_table"


@pytest.mark.parametrize("module", UPSTREAM)
def test_every_public_name_of_upstream_is_in_the_table_once(module: str) -> None:
    told = [name for row in ROWS if row.module == module for name in covered(row)]
    assert sorted(told) == names(module)
    assert any(row.module == module for row in ROWS)


@pytest.mark.parametrize("row", HERE, ids=lambda row: f"{row.module} {row.names[:30]}")
def test_what_is_here_can_be_imported(row: Row) -> None:
    if row.module == "shared_segment":
        pytest.importorskip("torch")
    module = mooncake if row.module == "__init__" else importlib.import_module(f"mooncake.{row.module}")
    assert not [name for name in covered(row) if not hasattr(module, name)]


@pytest.mark.parametrize("module", sorted(REASONS))
def test_a_module_that_is_left_out_says_why_and_can_be_looked_for(module: str) -> None:
    assert importlib.util.find_spec(f"mooncake.{module}") is not None
    with pytest.raises(ImportError, match=re.escape(REASONS[module])) as error:
        importlib.import_module(f"mooncake.{module}")
    assert error.value.name == f"mooncake.{module}"


def test_the_modules_left_out_are_those_of_the_table_and_of_the_cuda_wheels() -> None:
    assert sorted(REASONS) == sorted([*GONE, "allocator"])


def test_modules_below_one_that_is_left_out_say_the_same() -> None:
    with pytest.raises(ImportError, match="weights are not resharded"):
        importlib.import_module("mooncake.reshard.weight.planner")


def test_running_a_module_that_is_left_out_says_why() -> None:
    command = [sys.executable, "-m", "mooncake.vllm_v1_proxy_server", "--port", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "use `mooncake up`" in done.stderr


def test_classes_and_functions_that_are_left_out_say_why() -> None:
    with pytest.raises(RequestError, match="mooncake store --ssd-path"):
        MooncakeDistributedNoFRegister()
    with pytest.raises(RequestError, match="no C"):
        _get_pyclient_from_wrapper(object())


def test_the_package_has_no_other_names_by_chance() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = mooncake.Nothing
