import json
import subprocess

import pytest

from kinetiq.bench import environment


@pytest.fixture(autouse=True)
def _own_git(monkeypatch):
    """A git hook that runs the tests would have git answer for its own repository."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", *identity, *words]
    subprocess.run(command, check=True, cwd=folder, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "checkout"
    (root / "bench" / "results").mkdir(parents=True)
    (root / "pyproject.toml").write_text('[project]\nname = "kinetiq"\n')
    (root / "README.md").write_text("one")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "one")
    return root


def test_a_clean_tree_has_a_commit(checkout):
    commit, dirty = environment.describe_commit(checkout)
    assert len(commit) == 40 and set(commit) <= set("0123456789abcdef")
    assert dirty is False


@pytest.mark.parametrize("name", ["pyproject.toml", "new.py", "bench/new.py"])
def test_a_changed_or_new_file_makes_it_dirty(checkout, name):
    (checkout / name).write_text("changed")
    assert environment.describe_commit(checkout)[1] is True


@pytest.mark.parametrize("name", ["README.md", "bench/results/query.jsonl"])
def test_what_is_drawn_from_measurements_does_not(checkout, name):
    (checkout / name).write_text("changed")
    assert environment.describe_commit(checkout)[1] is False


def test_without_git_or_commits_there_is_no_commit(tmp_path, monkeypatch):
    assert environment.describe_commit(None) == (None, None)
    assert environment.describe_commit(tmp_path) == (None, None)
    git(tmp_path, "init", "-q")
    assert environment.describe_commit(tmp_path) == (None, None)
    monkeypatch.setenv("PATH", "")
    assert environment.describe_commit(tmp_path) == (None, None)


def test_a_copy_without_git_is_told_its_commit(checkout, tmp_path, monkeypatch):
    told = environment.describe_commit(checkout)
    monkeypatch.setenv(environment.COMMIT, "0123abc")
    assert environment.describe_commit(None) == ("0123abc", None)
    assert environment.describe_commit(checkout) == told  # git knows better


def test_the_repository_around_a_checkout_does_not_answer_for_it(checkout):
    assert environment.describe_commit(checkout / "bench") == (None, None)


def test_a_checkout_is_found_from_below(checkout, monkeypatch):
    monkeypatch.setattr(environment, "package_checkout", lambda: None)
    monkeypatch.chdir(checkout / "bench")
    assert environment.find_checkout() == checkout


def test_the_checkout_of_the_running_code_comes_first(checkout, monkeypatch, tmp_path):
    """Records of its code belong to it, wherever the command is run."""
    monkeypatch.setattr(environment, "package_checkout", lambda: tmp_path)
    monkeypatch.chdir(checkout)
    assert environment.find_checkout() == tmp_path


@pytest.mark.parametrize("text", ['[project]\nname = "other"\n', "[project", "[tool.x]\n", ""])
def test_a_folder_of_another_project_is_no_checkout(checkout, monkeypatch, text):
    (checkout / "pyproject.toml").write_text(text)
    monkeypatch.setattr(environment, "package_checkout", lambda: None)
    monkeypatch.chdir(checkout)
    assert environment.find_checkout() is None


def test_the_environment_says_where_and_with_what():
    told = environment.describe_environment("cpu")
    assert list(told) == ["commit", "dirty", "device", "machine", "versions"]
    assert told["device"] == "cpu"
    assert told["machine"]["cpu"] and told["machine"]["cores"] >= 1
    assert set(told["versions"]) == {"python", *environment.PACKAGES}
    assert {"kinetiq", "torch", "triton", "onnxruntime"} < set(environment.PACKAGES)
    assert told["versions"]["torch"]
    json.dumps(told, allow_nan=False)
