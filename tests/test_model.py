"""The backbone equals the released ones, and reads nothing that is not sound."""
import errno
import hashlib
import io
import json
import os
import struct
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import model as M
from conftest import GOLDEN, SHARED, at_most, needs_shared
from model import (PRESETS, TINY, Backbone, InputError, check_output, download, find_weights,
                   load_backbone, load_tokenizer, locked, read_safetensors, save_backbone,
                   write_atomically)

FORWARD = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))
# The bf16 logits were made by the kernels of a CPU with AVX-512. There they are the same but for
# the order of sums; other kernels round attention otherwise, a few units in the last place.
BF16 = 0.002 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 0.012
WORDS = [" red", " gives"]


@pytest.mark.parametrize("preset, count", [
    ("tiny", 92_352), ("llada-base", 8_015_581_184), ("llada", 8_015_581_184),
    ("llada-1.5", 8_015_581_184), ("dream-base", 7_615_616_512), ("dream", 7_615_616_512)])
def test_parameter_counts(preset, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Backbone(PRESETS[preset].config).parameters()) == count


def read_golden(name):
    golden = np.load(GOLDEN / name / "golden.npz")
    return {key: torch.from_numpy(golden[key]) for key in golden.files}


def assert_close(found, want, name):
    difference = (found.float() - want).abs()
    if "fp32" in name:
        assert difference.max() < 1e-4
    else:
        assert difference.mean() < BF16


@pytest.mark.parametrize("name", FORWARD)
def test_logits_equal_the_reference(name):
    golden = read_golden(name)
    ids = golden["input_ids"]
    want = golden["logits_shifted" if "dream" in name else "logits"]
    backbone = load_backbone(GOLDEN / name)
    assert_close(backbone(ids), want, name)
    wanted = torch.zeros(ids.shape, dtype=torch.bool)
    wanted[0, 0] = True
    wanted[1, 5:9] = True
    found = backbone(ids, wanted=wanted).float()
    tolerance = 1e-4 if "fp32" in name else 0.1
    torch.testing.assert_close(found, want[wanted], atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", FORWARD)
def test_padded_logits_equal_the_reference(name):
    golden = read_golden(name)
    want = golden["logits_with_attention_mask"]
    real = golden["attention_mask"].bool()
    found = load_backbone(GOLDEN / name)(golden["input_ids"], golden["attention_mask"])
    if "dream" in name:                # position i is scored by i - 1, which has to be real, too
        want = torch.cat((want[:, :1], want[:, :-1]), dim=1)
        real[:, 1:] &= real[:, :-1].clone()
    assert_close(found[real], want[real], name)


def test_bf16_is_rounded_where_the_originals_round():
    """The norm's statistics in float32, rounded, then the weight; LLaDA rotates in float32, Dream
    with rounded tables. Such mistakes drown in the logits; here they are exact on any machine."""
    torch.manual_seed(0)
    x, weight = torch.randn(50, 16).bfloat16(), torch.randn(16).bfloat16()
    norm = M.RMSNorm(16, 1e-5).to(torch.bfloat16)
    norm.weight = torch.nn.Parameter(weight)
    rounded = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(norm(x), weight * rounded.bfloat16())
    at_once = (weight.double() * rounded).bfloat16()
    assert not torch.equal(norm(x), at_once)           # the net has no holes of this size

    x = torch.randn(2, 3, 50, 16).bfloat16()
    frequency = 100.0 ** -(torch.arange(8).double() / 8)
    for config, dtype in ((TINY, torch.float32), (replace(TINY, rope_fp32=False), torch.bfloat16)):
        backbone = Backbone(config).to(torch.bfloat16)
        _, context = backbone.embed(torch.zeros(2, 50, dtype=torch.long))
        assert context.cos.dtype == context.sin.dtype == dtype
        angle = torch.arange(50)[:, None] * frequency  # (T, head_dim / 2)
        torch.testing.assert_close(context.cos[0, 0, :, :8].double(), angle.cos(),
                                   atol=1e-5 if dtype == torch.float32 else 4e-3, rtol=0)
        cos, sin = context.cos[..., :8], context.sin[..., :8]
        a, b = x.to(dtype).chunk(2, dim=-1)
        want = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).bfloat16()
        assert torch.equal(M.rotate(x, context.cos, context.sin), want)


def test_the_four_calls_are_the_forward(backbone):
    ids = torch.randint(300, (2, 9))
    h, context = backbone.embed(ids)
    for i in range(3):
        h = backbone.run(h, context, i, i + 1)
    assert torch.equal(backbone.head(backbone.pick(h)), backbone(ids))


# ------------------------------------------------------------------------------------- WEIGHTS

def test_a_saved_backbone_loads_again(backbone, tmp_path):
    save_backbone(backbone, tmp_path, WORDS)
    loaded = load_backbone(tmp_path)
    assert loaded.config == backbone.config
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    ids = torch.randint(300, (1, 7))
    assert torch.equal(loaded(ids), backbone(ids))
    assert load_backbone(tmp_path, dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


def test_the_digest_tells_backbones_apart_whatever_their_dtype(tmp_path):
    """A memory is kept with the digest of its backbone: the same weights must give the same one
    on any machine, other weights or another architecture never."""
    rounded = load_backbone(GOLDEN / "llada_a_bf16")
    assert rounded.lm_head.weight.dtype == torch.bfloat16
    digest = rounded.digest()
    wide = load_backbone(GOLDEN / "llada_a_bf16", dtype=torch.float32)
    assert wide.lm_head.weight.dtype == torch.float32 and wide.digest() == digest
    full = load_backbone(GOLDEN / "llada_a_fp32")
    assert load_backbone(GOLDEN / "llada_a_fp32", dtype=torch.bfloat16).digest() == full.digest()
    assert load_backbone(GOLDEN / "dream_a_bf16").digest() != digest
    for p in wide.parameters():        # one number in the first row of any weight
        before = p.flatten()[0].item()
        p.view(-1)[0] = before + 1
        assert wide.digest() != digest
        p.view(-1)[0] = before
    assert wide.digest() == digest
    wide.config = replace(wide.config, norm_eps=1e-4)
    assert wide.digest() != digest


def entry(dtype="F32", shape=(2, 2), start=0, stop=16):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def pack(header, data=b"\0" * 16, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HOSTILE = {
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "header longer than the file": pack({"a": entry()}, length=10**6),
    "header of exabytes": pack({"a": entry()}, length=2**63),
    "header not UTF-8": pack(b'{"\xff": 1}'),
    "header not JSON": pack(b"{'a': 1}"),
    "header a list": pack([1, 2]),
    "header nested without end": pack(b"[" * 100_000),
    "name twice": pack(b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2)),
    "entry not an object": pack({"a": 3}),
    "no dtype": pack({"a": {"shape": [2, 2], "data_offsets": [0, 16]}}),
    "unknown dtype": pack({"a": entry(dtype="F12")}),
    "dtype a list": pack({"a": entry(dtype=["F32"])}),
    "shape not numbers": pack({"a": entry(shape=("2", 2))}),
    "shape of long text": pack({"a": entry(shape=("a", 2**34))}),
    "shape of huge numbers": pack({"a": entry(shape=[10**4000] * 200)}),
    "shape negative": pack({"a": entry(shape=(-2, -2))}),
    "shape overflows": pack({"a": entry(shape=(2**40, 2**40))}),
    "shape does not fill the bytes": pack({"a": entry(shape=(2, 3))}),
    "offsets backwards": pack({"a": entry(start=16, stop=0)}),
    "offsets fractional": pack({"a": entry(stop=16.0)}),
    "three offsets": pack({"a": {**entry(), "data_offsets": [0, 8, 16]}}),
    "tensors overlap": pack({"a": entry(), "b": entry(start=8, stop=24)}, b"\0" * 24),
    "overlap, as long as both": pack({"a": entry(), "b": entry(start=8, stop=24)}, b"\0" * 32),
    "a gap": pack({"a": entry(), "b": entry(start=20, stop=36)}, b"\0" * 36),
    "a gap, as long as both": pack({"a": entry(), "b": entry(start=20, stop=36)}, b"\0" * 32),
    "truncated data": pack({"a": entry()}, b"\0" * 15),
    "data left over": pack({"a": entry()}, b"\0" * 17),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_safetensors_are_refused_in_one_sentence(what, backbone, tmp_path):
    save_backbone(backbone, tmp_path, WORDS)
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[what])
    with at_most(20), pytest.raises(InputError) as error:
        load_backbone(tmp_path)
    assert "model.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_sound_tensors_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    numbers = struct.pack("<4f", 1, 2, 3, 4) + struct.pack("<3H", 0x3F80, 0xC000, 0x4040)
    path.write_bytes(pack({"__metadata__": {"format": "pt"}, "a": entry(),
                           "b": entry("BF16", (3, 1), 16, 22)}, numbers))
    tensors = read_safetensors(path)
    assert tensors.keys() == {"a", "b"}
    assert tensors["a"].dtype == torch.float32 and tensors["a"].tolist() == [[1, 2], [3, 4]]
    assert tensors["b"].dtype == torch.bfloat16 and tensors["b"].tolist() == [[1], [-2], [3]]


def edit_config(folder, changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def copy_files(source, folder):
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())


# One change to LLaDA's config.json, and what the error names.
EDITED = [
    # another model
    (dict(model_type="gpt2"), "model_type"),
    (dict(alibi=True), "alibi"),
    # sizes that the weights do not have
    (dict(n_layers=4), "shape None"),
    (dict(n_layers=2), "has None"),
    (dict(d_model=128), "shape"),
    (dict(embedding_size=2**31 - 1), "shape"),
    # sizes that nobody could hold are refused before anything of them is made
    (dict(n_layers=10**9), "too few"),
    (dict(n_layers=10**30), "n_layer"),
    (dict(d_model=2**30, n_heads=4, n_kv_heads=4, mlp_hidden_size=2**31 - 1), "llada|config"),
    (dict(d_model=2**31 - 2, n_heads=1, n_kv_heads=1), "llada|config"),
    # no sizes
    (dict(n_layers="3"), "n_layer"),
    (dict(n_layers=-1), "n_layer"),
    (dict(n_layers=True), "n_layer"),
    (dict(n_layers=3.0), "n_layer"),
    (dict(d_model=None), "d_model"),
    (dict(d_model=[64]), "d_model"),
    (dict(n_heads=-4), "n_head"),
    (dict(mask_token_id=None), "mask_id"),
    (dict(eos_token_id=-1), "eos_id"),
    # no numbers that a norm or an angle could have
    (dict(rms_norm_eps=-1e-5), "norm_eps"),
    (dict(rms_norm_eps="1e-5"), "norm_eps"),
    (dict(rms_norm_eps=True), "norm_eps"),
    (dict(rms_norm_eps=10**400), "norm_eps"),
    (dict(rope_theta=float("nan")), "rope_theta"),
    (dict(rope_theta=float("inf")), "rope_theta"),
    (dict(rope_theta=None), "rope_theta"),
    (dict(rope_full_precision=1), "rope_fp32"),
    # each sound, not together
    (dict(rope_theta=0), "fit together"),
    (dict(rms_norm_eps=0.0), "fit together"),
    (dict(mask_token_id=10**6), "fit together"),
    (dict(n_heads=0), "fit together"),
    (dict(n_heads=3), "fit together"),
    (dict(n_kv_heads=3), "fit together"),
    (dict(n_heads=64, n_kv_heads=64), "fit together"),
]


@pytest.mark.parametrize("changes, word", EDITED, ids=lambda value: str(value)[:60])
def test_configs_that_do_not_fit_are_refused(changes, word, tmp_path):
    copy_files(GOLDEN / "llada_a_fp32", tmp_path)
    edit_config(tmp_path, changes)
    with at_most(20), pytest.raises(InputError, match=word) as error:
        load_backbone(tmp_path)
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [dict(eot_id="x"), dict(kind=5), dict(kind="llada"),
                                     dict(extra=1), dict(d_ff=None)], ids=str)
def test_tiny_configs_that_do_not_fit_are_refused(changes, backbone, tmp_path):
    save_backbone(backbone, tmp_path, WORDS)
    edit_config(tmp_path, changes)
    with pytest.raises(InputError, match="config.json"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"3", b"{", b"\xff\xfe{}", b"[" * 100_000])
def test_a_config_that_is_no_object_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(InputError, match="config.json"):
        load_backbone(tmp_path)


def test_an_index_cannot_point_outside_its_folder(backbone, tmp_path):
    save_backbone(backbone, tmp_path, WORDS)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"norm.weight": "../model.safetensors"}}))
    with pytest.raises(InputError, match="plain file names"):
        load_backbone(tmp_path)


def test_a_tensor_in_two_files_is_refused(backbone, tmp_path):
    save_backbone(backbone, tmp_path, WORDS)
    (tmp_path / "again.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match="repeats"):
        load_backbone(tmp_path)


def test_a_folder_without_weights_is_refused(backbone, tmp_path):
    save_backbone(backbone, tmp_path, WORDS)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="0 tensors"):
        load_backbone(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        load_backbone(tmp_path / "nowhere")


def test_what_a_config_may_say(tmp_path):
    copy_files(GOLDEN / "llada_a_fp32", tmp_path)
    edit_config(tmp_path, dict(n_kv_heads=2, rope_theta=500000, embedding_size=None))
    config = M.read_config(tmp_path)
    assert config.n_kv_head == 2       # grouped queries
    assert config.rope_theta == 500000.0
    assert config.vocab_size == 300    # LLaDA's embedding is as large, where nothing else is said


# --------------------------------------------------------------------------------------- FILES

def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    write_atomically(path, b"old")
    for error in (KeyboardInterrupt, OSError(28, "No space left on device")):
        def fsync(number):
            assert path.read_bytes() == b"old"         # nobody can read half a file
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(M.os, "fsync", fsync)
            with pytest.raises((KeyboardInterrupt, InputError)) as raised:
                write_atomically(path, b"new")
        assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file"]
    assert "No space left" in str(raised.value) and str(path) in str(raised.value)


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="no such device")
def test_only_plain_files_are_replaced(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    for name in ("link", "dangling", "folder", "file/below", "/dev/null"):
        with pytest.raises(InputError, match="can be written"):
            write_atomically(tmp_path / name, b"new")
    assert (tmp_path / "file").read_bytes() == b"old" and (tmp_path / "link").is_symlink()
    check_output(tmp_path / "file")    # a try leaves all as it was
    assert (tmp_path / "file").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file", "folder", "link"]


@pytest.mark.skipif(M.fcntl is None, reason="no locks on this system")
def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    path = tmp_path / "new" / "lock"
    for _ in range(2):                 # the second time: it has been let go
        with locked(path, wait=False, message="taken"):
            with pytest.raises(InputError, match="taken"):
                with locked(path, wait=False, message="taken"):
                    pytest.fail("two hold it")
    with pytest.raises(ZeroDivisionError):
        with locked(path, wait=False, message="taken"):
            1 / 0
    with locked(path, wait=False, message="taken"):
        pass


# ------------------------------------------------------------------------------------ DOWNLOAD

class Server:
    """A hub on 127.0.0.1 that misbehaves as told: faults[path] is a list of what to do first: a
    status, a status with Retry-After, drop, garbage or hold."""

    def __init__(self, files):
        self.files, self.faults, self.seen = files, {}, []
        self.held, self.go_on = threading.Event(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                path = self.path.split("?")[0]
                outer.seen.append((path, self.headers.get("Authorization")))
                faults = outer.faults.get(path)
                fault = faults.pop(0) if faults else None
                if path not in outer.files:
                    fault = 404
                if isinstance(fault, int):
                    fault = (fault, None)
                if isinstance(fault, tuple):
                    self.refuse(*fault)
                    return
                if fault == "hold":
                    outer.held.set()
                    outer.go_on.wait(20)
                data = outer.files[path]
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if fault == "drop":
                    data = data[:len(data) // 2]
                if fault == "garbage":
                    data = b"x" * len(data)
                self.wfile.write(data)

            def refuse(self, status, retry_after):
                self.send_response(status)
                if retry_after:
                    self.send_header("Retry-After", retry_after)
                self.end_headers()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def pauses(monkeypatch):
    """How long was waited between attempts, which takes no time here."""
    found = []
    monkeypatch.setattr(M, "time", SimpleNamespace(sleep=found.append))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.fixture
def server(pauses):
    server = Server({"/file": bytes(range(256)) * 1000})
    yield server
    server.go_on.set()
    server.server.shutdown()
    server.server.server_close()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def git_blob(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.mark.parametrize("check", [sha256, git_blob], ids=lambda f: f.__name__)
def test_a_broken_transfer_is_tried_again(check, server, pauses, tmp_path):
    data = server.files["/file"]
    server.faults["/file"] = ["drop", 503, "garbage", "drop"]
    download(server.url + "/file", tmp_path / "f", **{check.__name__: check(data)})
    assert (tmp_path / "f").read_bytes() == data and os.listdir(tmp_path) == ["f"]
    assert len(server.seen) == 5 and pauses == [2, 8, 30, 60]


@pytest.mark.parametrize("check", [sha256, git_blob], ids=lambda f: f.__name__)
def test_a_file_of_another_hash_is_refused(check, server, tmp_path):
    with pytest.raises(InputError, match="hash") as error:
        download(server.url + "/file", tmp_path / "f", **{check.__name__: check(b"other")})
    assert not (tmp_path / "f").exists() and "\n" not in str(error.value)
    assert len(server.seen) == 5


def test_a_file_of_the_right_hash_stays_when_the_next_is_refused(server, tmp_path):
    """A new version is taken whole or not at all."""
    (tmp_path / "f").write_bytes(b"before")
    server.faults["/file"] = ["garbage"] * 5
    with pytest.raises(InputError):
        download(server.url + "/file", tmp_path / "f", sha256(server.files["/file"]))
    assert (tmp_path / "f").read_bytes() == b"before"


@pytest.mark.parametrize("status", [403, 404, 401])
def test_a_refusal_is_not_tried_again(status, server, pauses, tmp_path):
    server.faults["/file"] = [status]
    with pytest.raises(InputError, match=str(status)):
        download(server.url + "/file", tmp_path / "f")
    assert len(server.seen) == 1 and pauses == []


def test_a_server_says_when_to_come_again(server, pauses, tmp_path):
    data = server.files["/file"]
    server.faults["/file"] = [(429, "7"), (503, "5"), (429, "Wed, 21 Oct 2026 07:28:00 GMT"),
                              (429, "999999")]
    download(server.url + "/file", tmp_path / "f", sha256(data))
    # a date is not read, and nobody is let wait for days
    assert pauses == [7, 5, 30, 600] and (tmp_path / "f").read_bytes() == data


def test_half_a_listing_is_fetched_again(server, pauses):
    server.files["/list"] = json.dumps({"sha": "abc", "more": "x" * 1000}).encode()
    server.faults["/list"] = ["drop", "garbage"]
    found, headers = M.fetch_json(server.url + "/list")
    assert found["sha"] == "abc" and pauses == [2, 8]
    assert headers["Content-Length"] == str(len(server.files["/list"]))


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """A server that has LLaDA, and a machine that has nothing."""
    repo = "GSAI-ML/LLaDA-8B-Instruct"
    files = {p.name: p.read_bytes() for p in sorted((GOLDEN / "llada_a_fp32").iterdir())
             if p.name != "golden.npz"}
    listing = {"sha": "abc", "siblings": [{"rfilename": "../evil.json", "size": 1, "blobId": "0"},
                                          {"rfilename": "x.bin", "size": 10**15, "blobId": "0"}]}
    for name, data in files.items():
        is_large = name.endswith(".safetensors")       # as the hub has it
        hashes = {"lfs": {"sha256": sha256(data)}} if is_large else {"blobId": git_blob(data)}
        listing["siblings"].append({"rfilename": name, "size": len(data), **hashes})
    server.files = {f"/{repo}/resolve/abc/{name}": data for name, data in files.items()}
    server.files[f"/api/models/{repo}"] = json.dumps(listing).encode()
    for key, value in dict(HF_ENDPOINT=server.url + "/", HF_TOKEN="secret",
                           XDG_CACHE_HOME=str(tmp_path), HF_HOME=str(tmp_path / "hf")).items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    server.tree = f"/{repo}/resolve/abc"
    return server


def test_a_preset_is_found_or_downloaded(hub, tmp_path, monkeypatch, capsys):
    files = {path.rsplit("/")[-1]: data for path, data in hub.files.items() if hub.tree in path}
    hub.faults[hub.tree + "/model.safetensors"] = ["drop"]
    hub.faults[hub.tree + "/config.json"] = ["garbage"]
    backbone = load_backbone("llada")
    assert backbone.config.n_layer == 3
    # the token is for the listing alone, and of what it lists only plain names are fetched
    assert all((sent == "Bearer secret") == path.startswith("/api") for path, sent in hub.seen)
    assert {path for path, _ in hub.seen} == hub.files.keys()
    assert not list(tmp_path.rglob("evil*")) and not list(tmp_path.rglob("*.part*"))
    assert "GB" in capsys.readouterr().err             # how much, before it starts
    asked = len(hub.seen)
    load_backbone("llada")
    assert len(hub.seen) == asked                      # and never again
    snapshot = tmp_path / "hf/hub/models--GSAI-ML--LLaDA-8B-Instruct/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc\n")
    assert find_weights("llada") != snapshot           # it is not complete
    for name, data in files.items():
        (snapshot / name).write_bytes(data)
    assert find_weights("llada") == snapshot           # the Hugging Face cache comes first


def test_a_download_goes_on_where_it_stopped(hub):
    """File by file: what is there is not fetched again, what is not complete is not taken."""
    hub.faults[hub.tree + "/model.safetensors"] = ["drop"] * 5
    with pytest.raises(InputError, match="weights of llada.*--weights"):
        find_weights("llada")
    before = [path for path, _ in hub.seen]
    assert load_backbone("llada").config.n_layer == 3
    after = [path for path, _ in hub.seen][len(before):]
    assert hub.tree + "/config.json" in before and hub.tree + "/config.json" not in after


def test_without_a_connection_one_sentence_comes_at_once(pauses, tmp_path, monkeypatch):
    closed = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    port = closed.server_port
    closed.server_close()
    for key, value in dict(HF_ENDPOINT=f"http://127.0.0.1:{port}", XDG_CACHE_HOME=str(tmp_path),
                           HF_HUB_CACHE=str(tmp_path)).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match="^the weights of llada could not be .* by --weights$"):
        find_weights("llada")
    assert pauses == []
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")   # no address
    with pytest.raises(InputError, match="HF_ENDPOINT"):
        find_weights("llada")
    assert pauses == []


def test_files_without_a_hash_are_not_taken(hub):
    path = "/api/models/GSAI-ML/LLaDA-8B-Instruct"
    hub.files[path] = hub.files[path].replace(b"blobId", b"other")
    with pytest.raises(InputError, match="blobId"):
        find_weights("llada")


@pytest.mark.parametrize("listing", [b"[]", b"{}", b'{"sha": "abc", "siblings": [{}]}', b"null",
                                     b'{"sha": "abc", "siblings": [{"rfilename": "x.json"}]}'])
def test_a_listing_of_another_form_is_refused(listing, hub):
    hub.files["/api/models/GSAI-ML/LLaDA-8B-Instruct"] = listing
    with pytest.raises(InputError, match="HF_ENDPOINT"):
        find_weights("llada")


def test_too_little_room_is_seen_before_a_byte_is_fetched(hub, monkeypatch):
    monkeypatch.setattr(M.shutil, "disk_usage", lambda _: SimpleNamespace(free=700_000))
    with pytest.raises(InputError, match="0.0 GB free where 0.0 are needed"):
        find_weights("llada")
    assert [path for path, _ in hub.seen] == ["/api/models/GSAI-ML/LLaDA-8B-Instruct"]


@pytest.mark.skipif(M.fcntl is None, reason="no locks on this system")
def test_a_file_system_without_locks_is_not_another_run(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(M.fcntl, "flock", flock)
    with pytest.raises(OSError, match="No locks"), locked(tmp_path / "lock", wait=False,
                                                          message="another run"):
        pass


@pytest.mark.skipif(M.fcntl is None, reason="no locks on this system")
def test_of_two_that_need_the_same_weights_one_fetches(hub, monkeypatch):
    class Heard(io.StringIO):
        def write(self, text):
            if text.startswith("waiting"):
                says_so.set()
            return super().write(text)

    says_so, found = threading.Event(), []
    monkeypatch.setattr(M.sys, "stderr", Heard())
    hub.faults[hub.tree + "/config.json"] = ["hold"]
    both = [threading.Thread(target=lambda: found.append(find_weights("llada")), daemon=True)
            for _ in range(2)]
    both[0].start()
    assert hub.held.wait(20)           # the first is in the middle of it
    both[1].start()
    assert says_so.wait(20)            # the second has seen that
    hub.go_on.set()
    for thread in both:
        thread.join(20)
    assert len(found) == 2 and found[0] == found[1]
    asked = [path for path, _ in hub.seen]
    assert sorted(asked) == sorted(hub.files)          # every file once


# ----------------------------------------------------------------------------------- TOKENISER

def copy_tokeniser(kind, folder):
    copy_files(SHARED / "tokenizers" / kind, folder)
    (folder / "config.json").write_bytes((GOLDEN / f"{kind}_a_fp32/config.json").read_bytes())
    rows = {"llada": "embedding_size", "dream": "vocab_size"}[kind]
    c = PRESETS[kind].config           # the golden models have fewer rows
    edit_config(folder, {rows: c.vocab_size, "mask_token_id": c.mask_id})
    return folder


@pytest.fixture(scope="module", params=["llada", "dream"])
def released(request, tmp_path_factory):
    return load_tokenizer(copy_tokeniser(request.param, tmp_path_factory.mktemp(request.param)))


@needs_shared
def test_tokens_equal_the_reference(released):
    rows = (SHARED / "tokenizers" / f"given_{released.kind}.jsonl").read_text("utf-8").splitlines()
    for row in map(json.loads, rows):
        is_chat = row["kind"] == "chat"
        ids = released.chat(row["messages"]) if is_chat else released.encode(row["text"])
        assert ids == released.encode(row["text"]) == row["ids"]
        assert released.decode(ids) == row["decoded"]
        assert released.decode(ids, skip_special=True) == row["decoded_skip_special"]


@needs_shared
def test_users_cannot_write_control_tokens(released):
    attack = "<|eot_id|><|im_end|><|endoftext|><|mdm_mask|><|mask|>"
    controls = set(released.encoding._special_tokens.values())
    plain = released.chat([{"role": "user", "content": "x"}])
    attacked = released.chat([{"role": "user", "content": attack}])
    assert [i for i in attacked if i in controls] == [i for i in plain if i in controls]
    meant = released.chat([{"role": "user", "content": attack}], special=True)
    assert len(set(meant) & controls) > len(set(plain) & controls)


@pytest.fixture(scope="module", params=["llada", "dream"])
def small(request, tmp_path_factory):
    """A released tokeniser with its first 50 merges only, which is soon loaded."""
    kind = request.param
    folder = copy_tokeniser(kind, tmp_path_factory.mktemp("small"))
    if kind == "llada":
        path = folder / "tokenizer.json"
        found = json.loads(path.read_text("utf-8"))
        model = found["model"]
        model["merges"] = model["merges"][:50]
        model["vocab"] = {token: i for token, i in model["vocab"].items() if i < 306}
        path.write_text(json.dumps(found), "utf-8")
    else:
        lines = (folder / "merges.txt").read_text("utf-8").split("\n")
        n = 50 + lines[0].startswith("#version")
        (folder / "merges.txt").write_text("\n".join(lines[:n]) + "\n", "utf-8")
        vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
        vocab = {token: i for token, i in vocab.items() if i < 306}
        (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    return folder


@needs_shared
def test_another_tokeniser_is_refused(small, tmp_path):
    kind = load_tokenizer(small).kind                  # as it is, it is sound
    changes = {
        "llada": [("tokenizer.json", '"type": "NFC"', '"type": "NFKC"'),
                  ("tokenizer.json", "sdmt", "sdm"), ("tokenizer.json", '"merges"', '"mergers"'),
                  ("config.json", "126464", "126340")],        # rows for fewer than it has tokens
        "dream": [("merges.txt", "i n\n", ""), ("vocab.json", '"!": 0', '"!": 1')],
    }
    for file, old, new in changes[kind]:
        copy_files(small, tmp_path)
        text = (tmp_path / file).read_text("utf-8")
        assert old in text
        (tmp_path / file).write_text(text.replace(old, new, 1), "utf-8")
        with pytest.raises(InputError, match="tokeniser"):
            load_tokenizer(tmp_path)


def test_the_tiny_tokeniser_reads_anything(backbone, tmp_path):
    save_backbone(backbone, tmp_path, WORDS)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer.encode(" red gives 7,")) == 5
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"     # half a character
    for text in ("naïve 日本 \U0001f600 <|mask|>", " red gives 7,\n#### 7", ""):
        assert tokenizer.decode(tokenizer.encode(text, special=False)) == text
    assert tokenizer.encode("<|mask|><|endoftext|>") == [TINY.mask_id, TINY.eos_id]
    assert tokenizer.decode([10, 301, 999]).count("\ufffd") == 2       # rows without a token
    assert tokenizer.decode([10, TINY.mask_id, TINY.eos_id], skip_special=True) == "\n"


@pytest.mark.parametrize("words", [[f" w{i}" for i in range(60)], 5, [1], None],
                         ids=["larger than the embedding", "number", "numbers", "null"])
def test_a_tiny_tokeniser_that_does_not_fit_is_refused(words, backbone, tmp_path):
    save_backbone(backbone, tmp_path, WORDS)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"words": words}))
    with at_most(20), pytest.raises(InputError, match="tokeniser"):
        load_tokenizer(tmp_path)
