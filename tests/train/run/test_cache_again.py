"""A process that asks more than once finds one folder of compiled programs."""

import jax
import pytest

from tests.train.run.test_cache import home as home
from tests.train.run.test_cache import no_kept_programs as no_kept_programs
from train.console.errors import UserError
from train.processes.cache import keep_compiled


def test_the_same_folder_twice_is_no_conflict(home, tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    monkeypatch.chdir(tmp_path)
    for asked in (str(tmp_path / "theirs"), "theirs", f"{tmp_path}/theirs/"):
        assert keep_compiled(asked) == f"Compiled programs are cached in {tmp_path}/theirs"
    with pytest.raises(UserError, match="Remove one of the two"):
        keep_compiled("others")


def test_what_an_earlier_run_has_set_is_not_the_users_own_setting(home, tmp_path):
    kept = "Compiled programs are cached in"
    assert keep_compiled(None) == f"{kept} {home}/lora_jax/jax"
    assert jax.config.jax_compilation_cache_max_size > 0
    for name in ("a", "b"):
        assert keep_compiled(str(tmp_path / name)) == f"{kept} {tmp_path / name}"
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / name)
        assert jax.config.jax_compilation_cache_max_size == -1
    assert keep_compiled("off") is None and jax.config.jax_compilation_cache_dir is None
    assert keep_compiled(None) == f"{kept} {home}/lora_jax/jax"
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    with pytest.raises(UserError, match="theirs. Remove one of the two"):
        keep_compiled(str(tmp_path / "a"))


def test_programs_go_to_the_folder_of_the_last_run(home, tmp_path):
    for name, n in (("a", 3), ("b", 5)):
        keep_compiled(str(tmp_path / name))
        jax.jit(lambda x, n=n: x * n + 1)(jax.numpy.ones(n)).block_until_ready()
        assert [*(tmp_path / name).glob("*-cache")], name
