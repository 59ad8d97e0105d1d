"""The Hub of the tests against the client as it is: that they understand each other, and what the client does when
things go wrong, which is what users of this library live with."""

import inspect
import json
from pathlib import Path

import pytest
from huggingface_hub.utils import http_backoff


# 1.20.1, the oldest client that is supported, does not: it passes such errors on, here and where it waits in vain.
RETRIED = [error.__name__ for error in inspect.signature(http_backoff).parameters["retry_on_exceptions"].default]
tries_again_when_hung_up_on = pytest.mark.skipif(
    "RemoteProtocolError" not in RETRIED, reason="this client does not try again when it is hung up on"
)

SMALL = b'{"model_type": "scan"}\n'
LARGE = bytes(range(256)) * 64

# Of a file: what it holds is compared here, not in the process.
DOWNLOAD = """
import sys
from huggingface_hub import hf_hub_download
print(hf_hub_download("alice/net", sys.argv[1], revision=(sys.argv + ["main"])[2]))
"""

UPLOAD = """
import sys
from huggingface_hub import create_repo, upload_folder
create_repo("alice/net", exist_ok=True)
print(upload_folder(repo_id="alice/net", folder_path=sys.argv[1], commit_message="Upload").oid)
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint as small as can be, with a file for each way to the Hub."""
    folder = tmp_path / "net"
    (folder / "figures").mkdir(parents=True)
    (folder / "config.json").write_bytes(SMALL)
    (folder / "model.safetensors").write_bytes(LARGE)
    (folder / "figures" / "exits.svg").write_bytes(b"<svg/>")
    (folder / "README.md").write_bytes(b"---\nlibrary_name: hf_scan\ntags:\n- early-exit\n---\nA net.\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def downloaded(hub, *arguments: str, **options) -> bytes:
    return Path(hub.run(DOWNLOAD, *arguments, **options).stdout.strip()).read_bytes()


def cached_files(cache: Path) -> list[bytes]:
    """What later calls could return."""
    return [path.read_bytes() for path in cache.glob("hub/models--alice--net/blobs/*")]


def test_a_folder_goes_up_and_comes_down_elsewhere(hub, folder, tmp_path):
    sha = hub.run(UPLOAD, folder).stdout.strip()

    files = hub.files("alice/net")
    assert files.pop(".gitattributes")
    assert files == contents(folder)
    assert [commit.title for commit in hub.commits("alice/net")] == ["Upload", "initial commit"]
    assert hub.commits("alice/net")[0].sha == sha
    # Only the weights took the way of large files, and there the token is nobody's business.
    [put] = hub.seen("PUT")
    assert put.server == "storage"
    assert not put.authorized
    assert all(request.user == "alice" for request in hub.seen("POST", "^/(api/models|api/repos|alice)"))

    code = """
    from huggingface_hub import hf_hub_download, model_info, snapshot_download
    print(snapshot_download("alice/net"))
    print(hf_hub_download("alice/net", "model.safetensors"))
    print(model_info("alice/net").library_name, model_info("alice/net").tags)
    """
    cache = tmp_path / "bob"
    there, weights, info = hub.run(code, user="bob", cache=cache).stdout.splitlines()
    assert Path(there).is_relative_to(cache)
    got = contents(Path(there))
    assert got.pop(".gitattributes")
    assert got == contents(folder)
    assert Path(weights).read_bytes() == LARGE
    assert info == "hf_scan ['early-exit']"
    [get] = hub.seen("GET", server="storage")
    assert not get.authorized

    before = len(hub.requests)
    assert hub.run(code, user="bob", cache=cache).stdout.splitlines()[0] == there
    assert not [request for request in hub.requests[before:] if request.server == "storage"]
    assert not [r for r in hub.requests[before:] if r.method == "GET" and "/resolve/" in r.path]


def test_nothing_changed_is_no_commit(hub, folder):
    hub.run(UPLOAD, folder)
    hub.run(UPLOAD, folder)
    assert len(hub.commits("alice/net")) == 2
    assert len(hub.seen("PUT")) == 1


def test_strangers_see_no_private_repository(hub, tmp_path):
    hub.push("alice/net", {"config.json": SMALL}, private=True)
    for user, status in ((None, 401), ("bob", 404)):
        cache = tmp_path / str(user)
        error = hub.run(DOWNLOAD, "config.json", user=user, cache=cache, expect_error=True)
        assert "RepositoryNotFoundError" in error
        assert [request.status for request in hub.seen("HEAD")][-1] == status
        assert not cached_files(cache)
    error = hub.run(DOWNLOAD, "config.json", user="hf_of_nobody", expect_error=True)
    assert "Invalid credentials in Authorization header" in error
    assert downloaded(hub, "config.json", user="alice") == SMALL
    assert downloaded(hub, "config.json", user="reader") == SMALL


def test_a_repository_can_be_made_private_and_goes_with_all_it_had(hub):
    code = """
    from huggingface_hub import HfApi
    api = HfApi()
    print(api.whoami()["name"], api.create_repo("net", private=True).repo_id)
    print(api.repo_exists("alice/net"), api.repo_exists("alice/net", token=False))
    api.update_repo_settings("alice/net", private=False)
    print(api.model_info("alice/net").private, api.repo_exists("alice/net", token=False))
    api.delete_repo("alice/net")
    print(api.repo_exists("alice/net"))
    """
    assert hub.run(code).stdout.splitlines() == ["alice alice/net", "True False", "False True", "False"]
    assert not hub.repos


def test_only_its_owner_writes(hub, folder):
    hub.push("alice/net")
    for user in ("bob", "reader"):
        assert "403 Forbidden" in hub.run(UPLOAD, folder, user=user, expect_error=True)
    assert "401" in hub.run(UPLOAD, folder, user=None, expect_error=True)
    assert len(hub.commits("alice/net")) == 1
    assert not hub.seen("PUT")


def test_a_repository_that_exists(hub):
    hub.push("alice/net", {"config.json": SMALL})
    code = "import sys; from huggingface_hub import create_repo; create_repo('alice/net', exist_ok=len(sys.argv) > 1)"
    assert "409" in hub.run(code, expect_error=True)
    hub.run(code, "--exist_ok")
    assert [request.status for request in hub.seen("POST", "repos/create")] == [409, 409]
    assert hub.files("alice/net")["config.json"] == SMALL


def test_every_revision_stays(hub):
    first = hub.push("alice/net", {"config.json": b"1", "model.safetensors": LARGE})
    second = hub.push("alice/net", {"config.json": b"2"})
    code = """
    from huggingface_hub import HfApi
    api = HfApi()
    api.create_tag("alice/net", tag="v1", revision=api.list_repo_commits("alice/net")[1].commit_id)
    api.create_branch("alice/net", branch="wild/ideas")
    api.create_branch("alice/net", branch="wild/ideas", exist_ok=True)
    api.upload_file(path_or_fileobj=b"3", path_in_repo="config.json", repo_id="alice/net", revision="wild/ideas")
    refs = api.list_repo_refs("alice/net")
    print(*sorted(ref.name for ref in refs.branches + refs.tags))
    for revision in (None, "v1", "wild/ideas", api.list_repo_commits("alice/net")[1].commit_id):
        path = api.hf_hub_download("alice/net", "config.json", revision=revision)
        large = api.snapshot_download("alice/net", revision=revision) + "/model.safetensors"
        print(open(path).read(), len(open(large, "rb").read()))
    """
    size = len(LARGE)
    assert hub.run(code).stdout.splitlines() == [
        "main v1 wild/ideas",
        *[f"{content} {size}" for content in (2, 1, 3, 1)],
    ]
    assert [hub.files("alice/net", revision)["config.json"] for revision in (first, second)] == [b"1", b"2"]
    assert "RevisionNotFoundError" in hub.run(DOWNLOAD, "config.json", "v2", expect_error=True)
    assert "EntryNotFoundError" in hub.run(DOWNLOAD, "nothing.json", expect_error=True)


def test_a_pull_request(hub, folder):
    hub.push("alice/net", {"config.json": b"{}"})
    code = """
    import sys
    from huggingface_hub import snapshot_download, upload_folder
    done = upload_folder(repo_id="alice/net", folder_path=sys.argv[1], create_pr=True, commit_message="Better")
    print(done.pr_revision, done.pr_num)
    print(snapshot_download("alice/net", revision="refs/pr/1"))
    """
    what, there = hub.run(code, folder, user="bob").stdout.splitlines()
    assert what == "refs/pr/1 1"
    assert contents(Path(there)).items() > contents(folder).items()
    assert hub.files("alice/net")["config.json"] == b"{}"
    assert hub.files("alice/net", "refs/pr/1")["config.json"] == SMALL
    hub.run("from huggingface_hub import merge_pull_request; merge_pull_request('alice/net', 1)", user="alice")
    assert hub.files("alice/net")["config.json"] == SMALL


def test_the_other_way_to_upload_folders(hub, folder):
    """With hf_xet at hand the client commits in the background, and opens its pull request first."""
    pytest.importorskip("hf_xet")
    hub.large = None
    hub.run(UPLOAD, folder, HF_HUB_DISABLE_XET=None)
    assert hub.files("alice/net").items() > contents(folder).items()
    (folder / "config.json").write_bytes(b"{}")
    code = """
    import sys
    from huggingface_hub import upload_folder
    print(upload_folder(repo_id="alice/net", folder_path=sys.argv[1], create_pr=True).pr_revision)
    """
    assert hub.run(code, folder, user="bob", HF_HUB_DISABLE_XET=None).stdout.strip() == "refs/pr/1"
    assert hub.files("alice/net", "refs/pr/1")["config.json"] == b"{}"
    assert hub.files("alice/net")["config.json"] == SMALL


def test_lists_and_deletions(hub):
    first = hub.push("alice/net", {"a/1.txt": b"1", "a/b/2.txt": b"2", "model.safetensors": LARGE})
    code = """
    import json, sys
    from huggingface_hub import CommitOperationAdd, HfApi
    api = HfApi()
    names = lambda entries: [entry.path for entry in entries]
    print(names(api.list_repo_tree("alice/net")))
    print(names(api.list_repo_tree("alice/net", "a", recursive=True)))
    print([(e.path, e.size, e.lfs is not None) for e in api.get_paths_info("alice/net", ["model.safetensors", "no"])])
    api.delete_file("a/1.txt", "alice/net")
    api.delete_folder("a/b", "alice/net")
    print(api.list_repo_files("alice/net"))
    try:
        late = [CommitOperationAdd("c.txt", b"c")]
        api.create_commit("alice/net", late, commit_message="Late", parent_commit=sys.argv[1])
    except Exception as error:
        print(error.response.status_code)
    api.create_repo("alice/pictures", repo_type="dataset")
    api.upload_file(path_or_fileobj=b"a,b", path_in_repo="a.csv", repo_id="alice/pictures", repo_type="dataset")
    print(open(api.hf_hub_download("alice/pictures", "a.csv", repo_type="dataset")).read())
    """
    assert hub.run(code, first).stdout.splitlines() == [
        "['.gitattributes', 'a', 'model.safetensors']",
        "['a/1.txt', 'a/b', 'a/b/2.txt']",
        f"[('model.safetensors', {len(LARGE)}, True)]",
        "['.gitattributes', 'model.safetensors']",
        "412",
        "a,b",
    ]
    assert hub.files("datasets/alice/pictures")["a.csv"] == b"a,b"


def test_hf_scan_is_there_for_clients(hub):
    code = "import importlib.util, os; print(importlib.util.find_spec('hf_scan').origin, os.environ.get('HF_TOKEN'))"
    origin, token = hub.run(code, user="bob").stdout.split()
    assert Path(origin).parent.parent == Path(__file__).parent.parent.parent
    assert token == hub.tokens["bob"]
    assert hub.run(code, user=None).stdout.split()[1] == "None"


# Where the client tries again by itself.


def test_uploads_are_tried_again(hub, folder):
    wait = {"Retry-After": "0"}
    hub.misbehave("POST", "preupload", status=429, headers=wait)
    hub.misbehave("POST", "objects/batch", status=503, headers=wait)
    hub.misbehave("PUT", status=500, headers=wait)
    hub.misbehave("POST", "lfs/verify", status=502, headers=wait)
    hub.run(UPLOAD, folder)
    assert hub.files("alice/net").items() > contents(folder).items()
    assert [request.status for request in hub.seen("POST", "preupload")] == [429, 200]
    assert [request.status for request in hub.seen("POST", "objects/batch")] == [503, 200]
    assert [request.status for request in hub.seen("PUT")] == [500, 200]
    assert [request.status for request in hub.seen("POST", "lfs/verify")] == [502, 200]
    assert len(hub.commits("alice/net")) == 2


@tries_again_when_hung_up_on
def test_an_upload_that_is_cut_off_is_tried_again(hub, folder):
    hub.misbehave("PUT", action="drop")
    hub.run(UPLOAD, folder)
    assert [request.status for request in hub.seen("PUT")] == [None, 200]
    assert hub.files("alice/net")["model.safetensors"] == LARGE


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_downloads_are_tried_again(hub, file):
    files = {"config.json": SMALL, "model.safetensors": LARGE}
    hub.push("alice/net", files)
    hub.misbehave("HEAD", file, status=503, headers={"Retry-After": "0"})
    hub.misbehave("GET", file, status=429, headers={"Retry-After": "0"})
    hub.misbehave("GET", file, action="drop")
    assert downloaded(hub, file) == files[file]
    assert hub.seen("HEAD")[0].status == 503
    assert [request.status for request in hub.seen("GET", file)] == [429, None, 200]


def test_a_long_download_goes_on_where_it_ended(hub):
    """From the last whole piece of 10 MiB on."""
    data = LARGE * 1600
    hub.push("alice/net", {"model.safetensors": data})
    hub.misbehave("GET", "model.safetensors", action="drop")
    assert downloaded(hub, "model.safetensors") == data
    [_, again] = hub.seen("GET", "model.safetensors")
    assert again.headers["Range"] == f"bytes={10 * 2**20}-"
    assert again.status == 206


@tries_again_when_hung_up_on
def test_a_silent_server(hub):
    hub.push("alice/net", {"model.safetensors": LARGE})
    hub.misbehave("GET", "model.safetensors", action="delay", seconds=2)
    assert downloaded(hub, "model.safetensors", HF_HUB_DOWNLOAD_TIMEOUT="1") == LARGE
    assert len(hub.seen("GET", "model.safetensors")) == 2


# Where it does not.

ATTEMPTS = """
import json, sys
from huggingface_hub import HfApi
api = HfApi()
attempts = {
    "whoami": lambda: api.whoami(),
    "create": lambda: api.create_repo("alice/other"),
    "info": lambda: api.model_info("alice/net"),
    "branch": lambda: api.create_branch("alice/net", branch="b"),
    "commit": lambda: api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id="alice/net"),
    "file": lambda: api.hf_hub_download("alice/net", "config.json"),
}
said = {}
for name, attempt in attempts.items():
    try:
        attempt()
        said[name] = "done"
    except Exception as error:
        said[name] = f"{type(error).__name__} {getattr(getattr(error, 'response', None), 'status_code', None)}"
print(json.dumps(said))
"""

PATHS = {
    "whoami": ("GET", "whoami"),
    "create": ("POST", "repos/create"),
    "info": ("GET", "^/api/models/alice/net$"),
    "branch": ("POST", "/branch/"),
    "commit": ("POST", "/commit/"),
    "file": ("GET", "/resolve/"),
}


@pytest.mark.parametrize("status", [503, 403])
def test_what_is_tried_once(hub, status):
    hub.push("alice/net", {"config.json": SMALL})
    for method, path in PATHS.values():
        hub.misbehave(method, path, status=status)
    assert json.loads(hub.run(ATTEMPTS).stdout) == dict.fromkeys(PATHS, f"HfHubHTTPError {status}")
    for method, path in PATHS.values():
        assert [request.status for request in hub.seen(method, path)] == [status]
    assert list(hub.repos) == ["alice/net"]
    assert len(hub.commits("alice/net")) == 2
    # The server is in order, and so is everything it was asked for.
    assert json.loads(hub.run(ATTEMPTS).stdout) == dict.fromkeys(PATHS, "done")


def test_too_many_requests_are_tried_once_too_but_for_files(hub):
    hub.push("alice/net", {"config.json": SMALL})
    for method, path in PATHS.values():
        hub.misbehave(method, path, status=429, headers={"Retry-After": "0"})
    said = json.loads(hub.run(ATTEMPTS).stdout)
    assert said.pop("file") == "done"
    assert said == {name: "HfHubHTTPError 429" for name in PATHS if name != "file"}


# What is left behind.


@pytest.mark.parametrize("action", ["truncate", "corrupt"])
def test_a_damaged_upload_is_no_commit(hub, folder, action):
    hub.misbehave("PUT", action=action)
    error = hub.run(UPLOAD, folder, expect_error=True)
    assert "Error while uploading 'model.safetensors' to the Hub" in error
    assert [request.status for request in hub.seen("PUT")] == [400]
    assert len(hub.commits("alice/net")) == 1
    hub.run(UPLOAD, folder)
    assert hub.files("alice/net")["model.safetensors"] == LARGE


def test_a_commit_that_is_refused(hub, folder):
    hub.misbehave("POST", "/commit/", status=500)
    assert "500" in hub.run(UPLOAD, folder, expect_error=True)
    assert len(hub.commits("alice/net")) == 1
    assert len(hub.seen("PUT")) == 1
    hub.run(UPLOAD, folder)
    assert hub.files("alice/net").items() > contents(folder).items()
    # What had arrived is not sent again.
    assert len(hub.seen("PUT")) == 1


@pytest.mark.parametrize(("action", "made"), [("drop", 1), ("reset", 1), ("lose", 2)])
def test_a_connection_that_ends_during_a_commit(hub, folder, action, made):
    """The client cannot know whether it was made, and says so; doing it again is safe either way."""
    hub.misbehave("POST", "/commit/", action=action)
    error = hub.run(UPLOAD, folder, expect_error=True)
    assert any(name in error for name in ("RemoteProtocolError", "ReadError", "WriteError"))
    assert len(hub.commits("alice/net")) == made
    hub.run(UPLOAD, folder)
    assert len(hub.commits("alice/net")) == 2
    assert hub.files("alice/net").items() > contents(folder).items()


@tries_again_when_hung_up_on
def test_the_other_way_commits_twice_when_the_answer_is_lost(hub, folder):
    """It tries a commit again without asking what became of it: the same files, in two commits."""
    pytest.importorskip("hf_xet")
    hub.large = None
    hub.misbehave("POST", "/commit/", action="lose")
    hub.run(UPLOAD, folder, HF_HUB_DISABLE_XET=None)
    first, second, _ = hub.commits("alice/net")
    assert first.files == second.files


@pytest.mark.parametrize(
    ("action", "file", "error"),
    [
        ("reset", "model.safetensors", "ReadError"),
        ("truncate", "model.safetensors", "Consistency check failed"),
        ("truncate", "config.json", "Consistency check failed"),
    ],
)
def test_half_a_file_is_not_kept(hub, tmp_path, action, file, error):
    files = {"config.json": SMALL, "model.safetensors": LARGE}
    hub.push("alice/net", files)
    hub.misbehave("GET", file, action=action)
    cache = tmp_path / "cache"
    assert error in hub.run(DOWNLOAD, file, cache=cache, expect_error=True)
    assert cached_files(cache) == []
    assert "LocalEntryNotFoundError" in hub.run(DOWNLOAD, file, cache=cache, expect_error=True, HF_HUB_OFFLINE="1")
    assert downloaded(hub, file, cache=cache) == files[file]


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_wrong_bytes_of_the_right_number_are_kept(hub, tmp_path, file):
    """The client compares no checksum of what it downloads, until it is asked to. Then, and when forced, it mends."""
    files = {"config.json": SMALL, "model.safetensors": LARGE}
    hub.push("alice/net", files)
    hub.misbehave("GET", file, action="corrupt")
    cache = tmp_path / "cache"
    wrong = downloaded(hub, file, cache=cache)
    assert wrong != files[file]
    assert len(wrong) == len(files[file])
    assert downloaded(hub, file, cache=cache) == wrong
    assert downloaded(hub, file, cache=cache, HF_HUB_OFFLINE="1") == wrong
    code = """
    import sys
    from huggingface_hub import HfApi
    print(*(mismatch["path"] for mismatch in HfApi().verify_repo_checksums("alice/net").mismatches))
    HfApi().hf_hub_download("alice/net", sys.argv[1], force_download=True)
    print(*(mismatch["path"] for mismatch in HfApi().verify_repo_checksums("alice/net").mismatches))
    """
    assert hub.run(code, file, cache=cache).stdout.split("\n") == [file, "", ""]
    assert cached_files(cache) == [files[file]]


# Without the Hub.

BOTH = """
from huggingface_hub import hf_hub_download, snapshot_download
print(hf_hub_download("alice/net", "model.safetensors"))
print(snapshot_download("alice/net"))
"""


def test_a_cache_is_enough(hub, tmp_path):
    hub.push("alice/net", {"config.json": SMALL, "model.safetensors": LARGE})
    cache = tmp_path / "cache"
    said = hub.run(BOTH, cache=cache).stdout
    before = len(hub.requests)
    nowhere = "http://127.0.0.1:9"
    for away in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": nowhere}):
        assert hub.run(BOTH, cache=cache, **away).stdout == said
    assert len(hub.requests) == before
    # A server that is there but answers nothing but errors is no worse.
    hub.misbehave("HEAD", status=503, times=None)
    hub.misbehave("GET", "/api/models", status=503, times=None)
    assert hub.run(BOTH, cache=cache).stdout == said


def test_a_cache_does_not_help_where_the_connection_ends(hub, tmp_path):
    """The client falls back on its cache when it cannot connect, but not when it is hung up on."""
    hub.push("alice/net", {"config.json": SMALL})
    cache = tmp_path / "cache"
    hub.run(DOWNLOAD, "config.json", cache=cache)
    hub.misbehave("HEAD", action="drop")
    assert "RemoteProtocolError" in hub.run(DOWNLOAD, "config.json", cache=cache, expect_error=True)


def test_no_hub_and_no_cache(hub):
    hub.push("alice/net", {"config.json": SMALL})
    assert "LocalEntryNotFoundError" in hub.run(DOWNLOAD, "config.json", HF_HUB_OFFLINE="1", expect_error=True)
    code = "from huggingface_hub import snapshot_download; snapshot_download('alice/net')"
    assert "LocalEntryNotFoundError" in hub.run(code, HF_HUB_OFFLINE="1", expect_error=True)
    assert "OfflineModeIsEnabled" in hub.run(
        "from huggingface_hub import create_repo; create_repo('alice/other')", HF_HUB_OFFLINE="1", expect_error=True
    )
    assert not hub.requests


def test_misbehaviour_that_nobody_can_show(hub):
    with pytest.raises(ValueError, match=r"either `status` or `action`"):
        hub.misbehave("GET", "file")
    with pytest.raises(ValueError, match=r"`action` is one of drop, .*, not 'explode'"):
        hub.misbehave("GET", "file", action="explode")
