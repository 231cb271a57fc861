"""A collection's page: what it holds, who may see it, what it saves; and in a browser, that it can be used."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from browsing import count, downloads, element, elements, loaded, move, opened, until, where
from run_samples import write_images
from table_samples import crowds, noise_pictures, write_encoder, write_table

import crosslevel
from crosslevel.cli import main
from crosslevel.data.open import open_images
from crosslevel.exploration.explore import explore, gather
from crosslevel.exploration.export import export_page
from crosslevel.exploration.layout import lay_out
from crosslevel.exploration.server import Server
from crosslevel.metrics.nearest import nearest
from crosslevel.utils.console import printer


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """240 images in four classes of one colour each, and a table with pictures and a column of losses."""
    folder = tmp_path_factory.mktemp("explore")
    photos = write_images(folder / "photos", count=60, classes=("ant", "bee", "cat", "dog"))
    features, owner = crowds([60] * 4, noise=0.15)
    paths = sorted(str(file.relative_to(photos)) for file in photos.rglob("*.png"))
    write_table(
        folder / "f.parquet", features, paths, noise_pictures(240),
        {"images": str(photos), "root": str(photos)}, label=owner.numpy(),
        **{"class": [path.split("/")[0] for path in paths], "loss": torch.linspace(0, 1, 240).numpy()},
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def collection(home):
    return gather(str(home / "f.parquet"), None, 1000, 0, printer(quiet=True))


@pytest.fixture
def server(collection, tmp_path):
    with Server(collection, tmp_path / "lists") as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


def ask(server, path, host=None, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1])
    connection.request("POST" if body is not None else "GET", path, body, {"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_crowds_lie_apart_on_the_map():
    features, owner = crowds([60] * 4, noise=0.15)
    unit = torch.nn.functional.normalize(features, dim=1)
    points = lay_out(unit, nearest(unit, unit, 33))
    apart = torch.cdist(points, points).fill_diagonal_(float("inf"))
    assert (owner[apart.argmin(1)] == owner).float().mean() > 0.97
    assert torch.equal(points, lay_out(unit, nearest(unit, unit, 33)))


def test_the_page_has_every_image_and_what_is_most_like_it(collection):
    told = json.loads(collection.data(served=True))
    assert len(told["paths"]) == 240
    assert {"label", "loss", "group", "near-duplicate", "outlier", "broken"} == set(told["columns"])
    assert told["columns"]["label"]["names"] == ["ant", "bee", "cat", "dog", "none"]
    similar = collection.similar()
    unit = collection.unit
    truth = (unit @ unit.T).fill_diagonal_(-2).topk(12).indices
    assert similar.shape == (240, 12)
    assert sum(len(set(a) & set(b)) for a, b in zip(similar.tolist(), truth.tolist(), strict=True)) >= 0.99 * 12 * 240


def test_no_name_ends_the_script(tmp_path):
    paths = ["</script><script>alert(1)</script>", *(f"{i}.png" for i in range(9))]
    file = write_table(tmp_path / "f.parquet", torch.eye(10), paths, noise_pictures(10))
    page = explore(str(file), export=str(tmp_path / "out"), quiet=True)
    assert "</script" not in Path(page).with_name("data.js").read_text()


def test_nothing_is_answered_without_the_token(server):
    token = f"/{server.token}/"
    assert ask(server, token)[0] == 200
    assert ask(server, f"{token}data.js")[1].startswith(b"const DATA = {")
    assert [ask(server, f"{token}explore.{kind}")[0] for kind in ("css", "js")] == [200, 200]
    assert ask(server, "/explore.js")[0] == 404
    status, picture = ask(server, f"{token}images/0/7.jpg")
    assert (status, picture[:3]) == (200, b"\xff\xd8\xff")
    refused = ["/", "/data.js", "/images/0/7.jpg", f"/{server.token[:-1]}/", f"/{'x' * 24}/data.js"]
    unknown = [f"{token}images/0/999.jpg", f"{token}../f.parquet", f"{token}images/0/../../f.parquet", f"{token}none"]
    assert [ask(server, path)[0] for path in refused + unknown] == [404] * 9
    assert ask(server, token, host="attacker.example")[0] == 404
    assert ask(server, "/list", body="{}")[0] == 404


def test_numbers_that_are_none_are_refused(server, capfd):
    """Python raises on a number of more than 4,300 digits."""
    assert ask(server, f"/{server.token}/images/0/{'9' * 5000}.jpg")[0] == 404
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1])
    connection.putrequest("POST", f"/{server.token}/list")
    connection.putheader("Content-Length", "many")
    connection.endheaders()
    assert connection.getresponse().status == 404
    connection.close()
    assert "Traceback" not in capfd.readouterr().err


def test_a_circled_set_becomes_a_part_of_the_source(server, home):
    def save(name, points):
        return json.loads(ask(server, f"/{server.token}/list", body=json.dumps({"name": name, "points": points}))[1])

    told = save("mine", [5, 3, 3, 70])
    assert told["file"] == str(server.lists / "mine.txt")
    images = open_images(told["use"])
    paths = server.collection.paths
    assert list(images.paths) == [paths[3], paths[5], paths[70]]
    assert images.classes == ["ant", "bee", "cat", "dog"]
    assert "is there already" in save("mine", [1, 2])["error"]
    assert "two images" in save("one", [1])["error"]
    for name in ("../x", "/tmp/x", "", ".x", "a/b"):
        assert "the name of a list" in save(name, [1, 2])["error"]
    assert [file.name for file in server.lists.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("sample", [40, 1000])
def test_of_more_images_some_are_drawn(home, sample):
    few = gather(str(home / "f.parquet"), None, sample, 0, printer(quiet=True))
    assert len(few.rows) == min(sample, 240)
    assert few.paths == [few.table.paths[row] for row in few.rows.tolist()]
    assert json.loads(few.data(False))["all"] == 240
    assert torch.equal(few.unit, torch.nn.functional.normalize(few.table.features[few.rows], dim=1))


def test_a_port_in_use_and_other_wrong_use_end_in_one_line(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table = str(home / "f.parquet")
    write_table(tmp_path / "empty.parquet", torch.zeros(0, 8))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cases = [
            ([table, f"--port={taken.getsockname()[1]}", "--browser=false"], "is in use"),
            ([table, "--port=99999"], "port from 0 to 65535"),
            (["none.parquet"], "there is no such table"),
            (["empty.parquet"], "has 0 rows"),
            ([table, "--export=full"], "is there already"),
        ]
        for line, named in cases:
            with pytest.raises(SystemExit) as stop:
                main(["explore", *line])
            said = capsys.readouterr().err
            assert (stop.value.code, said.count("\n")) == (2, 1), said
            assert named in said, (line, said)
    assert (tmp_path / "full" / "letter.txt").read_text() == "mine"


def _interruptible():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job inherits that it is ignored


def test_the_command_says_where_it_is_and_ends_with_ctrl_c(home):
    line = [sys.executable, "-m", "crosslevel", "explore", str(home / "f.parquet"), "--sample=30"]
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"} | {"BROWSER": "/bin/false"}
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        preexec_fn=_interruptible,  # noqa: PLW1509 - no other thread of the tests holds a lock
    ) as started:  # fmt: skip
        said = ""
        while "open the address yourself" not in said:
            part = started.stdout.readline()
            assert part, said
            said += part
        port, token = re.search(r"http://127\.0\.0\.1:(\d+)/([\w-]+)/ \(Ctrl-C ends\)", said).groups()
        connection = http.client.HTTPConnection("127.0.0.1", int(port))
        connection.request("GET", f"/{token}/")
        assert connection.getresponse().status == 200
        started.send_signal(signal.SIGINT)
        try:
            assert started.wait(60) == 0
        finally:
            started.kill()


@pytest.fixture(scope="module")
def exported(collection, tmp_path_factory):
    return export_page(collection, str(tmp_path_factory.mktemp("page")))


@pytest.fixture(params=["served", "exported"])
def page(request, browser, server, exported):
    opened(browser, server.address if request.param == "served" else exported.as_uri())
    return browser


@pytest.mark.browser
def test_browser_shows_images_and_what_is_similar(page, collection):
    move(page, [where(page, 70)])
    assert element(page, "#tip").is_displayed()
    point = int(element(page, "#tip").get_attribute("data-point"))
    loaded(page, "#tip img")
    assert element(page, "#tip span").text == f"{collection.paths[point]} · {collection.paths[point].split('/')[0]}"
    move(page, [where(page, point)], press=True)
    assert element(page, "#path").text == collection.paths[point]
    shown = elements(page, "#similar button")
    assert [int(button.get_attribute("data-point")) for button in shown] == collection.similar()[point].tolist()
    loaded(page, "#similar button:last-child img")
    other = int(shown[0].get_attribute("data-point"))
    page.execute_script("arguments[0].scrollIntoView()", shown[0])
    shown[0].click()
    assert element(page, "#path").text == collection.paths[other]
    assert page.get_log("browser") == []


@pytest.mark.browser
def test_browser_filters_by_label_number_and_name(page):
    assert count(page) == 240
    element(page, "input[data-name=ant]").click()
    assert count(page) == 180
    element(page, "#none").click()
    assert count(page) == 0
    element(page, "input[data-name=bee]").click()
    element(page, "#find").send_keys("/00")
    assert count(page) == 10
    element(page, "#find").send_keys("\b\b\b")
    element(page, "#all").click()
    page.execute_script(
        "const s = document.querySelector('#colour'); s.value = 'loss'; s.dispatchEvent(new Event('change'))"
    )
    assert element(page, "#range").is_displayed()
    page.execute_script("const s = document.querySelector('#low'); s.value = 0.5; s.dispatchEvent(new Event('change'))")
    assert count(page) == 120


@pytest.mark.browser
def test_browser_circles_a_crowd_and_saves_it(page, server, request, home, tmp_path):
    downloads(page, tmp_path)
    places = torch.tensor(page.execute_script("return [...Array(240).keys()].map(whereIs)"))
    low, high = places[:60].min(0).values - 6, places[:60].max(0).values + 6
    (left, top), (right, bottom) = low.tolist(), high.tolist()
    element(page, "#lasso").click()
    move(page, [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)], press=True)
    inside = int(((low < places) & (places < high)).all(1).sum())
    assert abs(int(element(page, "#circled").get_attribute("data-count")) - inside) <= 2
    assert inside >= 60
    name = element(page, "#name")
    name.clear()
    name.send_keys("ants")
    element(page, "#save").click()
    until(lambda: element(page, "#saved").text, "the answer")
    assert "ants.txt" in element(page, "#saved").text
    file = (server.lists if "served" in request.node.name else tmp_path) / "ants.txt"
    until(file.is_file, "the list")
    saved = file.read_text().splitlines()
    assert len(saved) == int(element(page, "#circled").get_attribute("data-count"))
    assert set(server.collection.paths[:60]) <= {line.split("\t")[0] for line in saved}
    assert [f"{path}\t-1" for path in open_images(f"{home / 'photos'}@list={file}").paths] == saved


def test_a_table_of_embed_is_explored_as_it_is(tmp_path):
    photos, folder = write_images(tmp_path / "photos", count=8), write_encoder(tmp_path / "run")
    table = crosslevel.embed(folder, photos, output=tmp_path / "f.parquet", device="cpu", quiet=True, workers=0)
    page = explore(str(table), export=str(tmp_path / "out"), quiet=True)
    told = json.loads(
        Path(page).with_name("data.js").read_text().removeprefix("const DATA = ").rstrip().removesuffix(";")
    )
    assert told["paths"][0] == "cat/000.png"
    assert len(list((tmp_path / "out" / "images").rglob("*.jpg"))) == 16  # of the files, as the table has no pictures
