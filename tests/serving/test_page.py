"""The page, as a browser shows it: one session of Debian's Chromium with a tiny model."""

import io
import json
import shutil
import time
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import soundfile

from launch.serve.uploads import Reader
from magnet_jax.config import ASSETS
from magnet_jax.serving import route_page
from magnet_jax.serving.access import Access

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs a Chromium: apt-get install chromium"
)
SECONDS = 0.6
CLIP = ASSETS / "clips" / "02_bach.flac"
KEY = "k" * 16
# One that beeps, and that nobody is asked about.
MICROPHONE = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--mute-audio", *MICROPHONE]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(engine, listening):
    reader = Reader()
    with listening(engine, read=reader, page=True) as url:
        yield url
    reader.close()


@pytest.fixture(scope="module")
def wrong():
    """What the browser complains of, and what it asks elsewhere."""
    return []


@pytest.fixture(scope="module")
def page(browser, url, wrong):
    context = browser.new_context(viewport={"width": 1200, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(60_000)

    def asked(request):
        if urlsplit(request.url).scheme not in ("data", "blob") and not request.url.startswith(url):
            wrong.append(request.url)

    page.on("request", asked)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.goto(url)
    page.get_by_text("tiny: ready").wait_for()
    page.get_by_label("Seconds", exact=True).fill(str(SECONDS))
    page.get_by_label("Quality").select_option("")
    yield page
    context.close()


def make(page, text):
    """Asks for what the form says, and gives its card when the clips are there."""
    count = page.get_by_role("article").count()
    page.get_by_label("Text", exact=True).fill(text)
    page.locator("#make").click()
    until(page, f"document.querySelectorAll('article').length > {count}")
    card = page.get_by_role("article", name=text).first
    card.get_by_role("button", name="Play").first.wait_for()
    return card


def until(where, expression):
    """Waits for something of a page or an element; the page itself lets no text be evaluated."""
    for _ in range(600):
        if where.evaluate(expression):
            return
        time.sleep(0.1)
    pytest.fail(expression)


def strip_of(card):
    canvas = card.locator("canvas").first
    canvas.evaluate("c => c.scrollIntoView({block: 'center'})")
    return canvas


def downloaded(page, card, name="WAV"):
    card.locator("summary", has_text="Download").first.click()
    with page.expect_download() as download:
        card.get_by_role("link", name=name, exact=True).first.click()
    content = download.value.path().read_bytes()
    return download.value.suggested_filename, soundfile.read(io.BytesIO(content), dtype="int16")


def test_three_clips_in_a_row_and_the_third_plays(page):
    cards = [make(page, f"a harp, {i}") for i in range(3)]
    assert page.get_by_role("article").count() == 3
    cards[2].get_by_role("button", name="Play").click()
    until(page, "document.querySelector('audio').currentTime > 0.1")
    source = page.evaluate("document.querySelector('audio').currentSrc")
    job = cards[2].locator("[data-job]").get_attribute("data-job")
    assert f"/v1/jobs/{job}/audio/0" in source
    until(page, "document.querySelector('audio').paused")  # at its end
    name, (wav_N, rate) = downloaded(page, cards[2])
    assert name.startswith("a-harp-2-seed") and (len(wav_N), rate) == (SECONDS * 16000, 16000)
    assert np.std(wav_N / 2**15) > 0.01
    # The same text, seed and settings once more are the same clip.
    cards[2].get_by_role("button", name="Same settings").click()
    assert page.get_by_label("Seed", exact=True).input_value() in name
    again = make(page, "a harp, 2")
    np.testing.assert_array_equal(downloaded(page, again)[1][0], wav_N)
    page.get_by_label("Seed", exact=True).fill("")


def test_a_region_is_dragged_and_the_rest_of_the_file_stays(page, tmp_path):
    before_N, rate = soundfile.read(CLIP, frames=32000, dtype="int16")
    soundfile.write(tmp_path / "mine.wav", before_N, rate)
    page.get_by_role("tab", name="Edit").click()
    page.locator("#upload").set_input_files(tmp_path / "mine.wav")
    page.get_by_text("mine.wav, 1 s").wait_for()
    canvas = page.get_by_role("slider", name="What is edited")
    box = canvas.bounding_box()
    at = lambda share: (box["x"] + share * box["width"], box["y"] + box["height"] / 2)  # noqa: E731
    for first, then in ((0.2, 0.9), (0.9, 0.8)):  # a new region, and then its end
        page.mouse.move(*at(first))
        page.mouse.down()
        page.mouse.move(*at((first + then) / 2))
        page.mouse.move(*at(then))
        page.mouse.up()
    ends = [
        float(page.get_by_label(f"Region 1, {end}, in seconds").input_value())
        for end in ("begin", "end")
    ]
    assert np.allclose(ends, [0.2, 0.8], atol=0.021)
    card = make(page, "an organ")
    _, (after_N, after_rate) = downloaded(page, card)
    assert after_rate == rate and len(after_N) == len(before_N)
    same = np.ones(len(before_N), bool)
    same[round(ends[0] * rate) : round(ends[1] * rate)] = False
    np.testing.assert_array_equal(after_N[same], before_N[same])
    assert (after_N[~same] != before_N[~same]).mean() > 0.5
    # What changed is hatched, and there is a switch to what there was.
    assert marked(strip_of(card)) > 100
    card.get_by_role("button", name="Before").click()
    card.locator("[aria-pressed=true]").wait_for()
    assert marked(strip_of(card)) == 0


def marked(canvas):
    """How many pixels have the colour of what is marked."""
    return canvas.evaluate(
        """canvas => {
          const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
          let count = 0;
          for (let i = 0; i < data.length; i += 4) count += data[i] > 180 && data[i + 2] < 90;
          return count;
        }"""
    )


def test_an_edit_by_keys_alone_and_how_sure_the_model_is(page):
    page.get_by_label("Show how sure", exact=False).evaluate("box => box.checked = true")
    page.get_by_role("tab", name="Edit").focus()
    page.keyboard.press("ArrowLeft")  # to Create, and back
    page.keyboard.press("ArrowRight")
    canvas = page.get_by_role("slider", name="What is edited")
    canvas.focus()
    page.keyboard.press("Delete")  # the region that was dragged
    for key in ("Home", *["ArrowRight"] * 6, "]"):  # from the beginning to 0.6 s
        page.keyboard.press(key)
    assert page.get_by_label("Region 1, end, in seconds").input_value() == "0.6"
    page.keyboard.press("ArrowRight")  # by a frame
    assert page.get_by_label("Region 1, end, in seconds").input_value() == "0.62"
    page.get_by_label("Text", exact=True).fill("by keys")
    page.get_by_label("Text", exact=True).press("Control+Enter")
    card = page.get_by_role("article", name="by keys")
    card.get_by_role("button", name="Play").wait_for()
    job = card.locator("[data-job]").get_attribute("data-job")
    view = json.loads(page.evaluate(f"fetch('/v1/jobs/{job}').then(a => a.text())"))
    assert view["request"]["regions"] == [[0.02, 0.62]]
    assert len(view["results"][0]["confidence"]) == 50
    page.get_by_label("Show how sure", exact=False).evaluate("box => box.checked = false")


def test_what_was_typed_and_marked_outlives_uploads_refreshes_and_other_edits(page):
    text, begin = (
        page.get_by_label("Text", exact=True),
        page.get_by_label("Region 1, begin", exact=False),
    )
    text.fill("typed and not sent")
    page.get_by_role("button", name="Example").click()
    page.get_by_text("an example, ").wait_for()
    assert text.input_value() == "typed and not sent"
    page.get_by_role("button", name="Add a region").click()
    page.get_by_role("button", name="Add a region").click()  # behind the first
    assert page.get_by_label("Region 2, begin", exact=False).input_value() == "1.2"
    page.get_by_label("Region 2, end", exact=False).press("ArrowUp")  # stays under the keys
    page.keyboard.press("ArrowUp")
    assert page.get_by_label("Region 2, end", exact=False).input_value() == "4.2"
    page.reload()
    page.get_by_text("an example, ").wait_for()
    assert text.input_value() == "typed and not sent" and page.locator("#regions li").count() == 2
    page.locator("#kind").select_option("restyle")
    page.get_by_text("All of the clip is edited.").wait_for()
    page.reload()
    page.get_by_text("All of the clip is edited.").wait_for()
    assert page.get_by_label("Strength").is_visible() and not begin.is_visible()
    page.locator("#kind").select_option("inpaint")
    assert page.locator("#regions li").count() == 2 and begin.is_visible()


def test_a_recording_is_edited(page, engine):
    page.get_by_role("button", name="Record").click()
    page.get_by_role("button", name="End the recording").wait_for()
    page.wait_for_timeout(700)
    page.get_by_role("button", name="End the recording").click()
    page.get_by_text("a recording, ").wait_for()
    source = json.loads(page.evaluate("localStorage['magnet_jax.source']"))
    wav_N, _ = soundfile.read(engine.files.upload(source["file"]) / "audio.wav")
    assert len(wav_N) > 0.3 * 48000 and np.abs(wav_N).max() > 0.01


def test_a_loop_plays_on_and_on(page):
    page.get_by_role("tab", name="Loop").click()
    page.get_by_label("Beats a minute").fill("300")
    page.get_by_label("Bars", exact=True).fill("1")
    page.get_by_label("Beats a bar").fill("3")
    page.get_by_text("0.6 s. The tempo").wait_for()
    card = make(page, "a jig")
    canvas = strip_of(card)
    card.get_by_role("button", name="Play").click()
    until(canvas, "c => c.dataset.at > 0.3")
    until(canvas, "c => c.dataset.at < 0.3")  # goes on
    card.get_by_role("button", name="Pause").click()
    name, (wav_N, rate) = downloaded(page, card, "WAV with tempo and bars")
    assert "300bpm-1bars" in name and len(wav_N) == 0.6 * rate


def test_drafts_are_starred_and_refined(page):
    page.get_by_role("tab", name="Drafts").click()
    page.locator("#drafts").fill("2")
    drafts = make(page, "a draft")
    drafts.get_by_role("button", name="Play").nth(1).wait_for()
    refine = drafts.get_by_role("button", name="Refine starred")
    assert refine.is_hidden()
    drafts.locator(".star").nth(1).click()
    seed = drafts.locator(".star input").nth(1).get_attribute("aria-label").split()[-1]
    refine.click()
    page.locator(".card").nth(1).get_by_text("2 drafts").wait_for()
    clip = page.get_by_role("article", name="a draft").first
    clip.get_by_text(f"seed {seed}").wait_for()
    draft, made = (
        json.loads(page.evaluate(f"fetch('/v1/jobs/{job}').then(a => a.text())"))
        for job in (
            drafts_job(page.locator(".card").nth(1), 1),
            drafts_job(clip, 0),
        )
    )
    codes = [
        page.evaluate(
            "url => fetch(url).then(a => a.arrayBuffer()).then(b => [...new Uint8Array(b)])",
            view["results"][0]["tokens"],
        )
        for view in (draft, made)
    ]
    draft_KT, made_KT = (np.load(io.BytesIO(bytes(one)))["codes_KT"] for one in codes)
    np.testing.assert_array_equal(draft_KT[0], made_KT[0])  # what is heard first stays
    assert (draft_KT[1:] != made_KT[1:]).any()


def drafts_job(card, index):
    return card.locator("[data-job]").nth(index).get_attribute("data-job")


def test_progress_cancel_and_a_refresh(page, engine, gate):
    page.get_by_role("tab", name="Create").click()
    count = page.get_by_role("article").count()
    with gate.shut():
        for text in ("held up", "waits"):
            page.get_by_label("Text", exact=True).fill(text)
            page.locator("#make").click()
            page.get_by_role("article", name=text).wait_for()
        waits = page.get_by_role("article", name="waits")
        waits.get_by_text("one job before it").wait_for()
        waits.get_by_role("button", name="Cancel").click()
        waits.get_by_text("cancelled").wait_for()
        job = waits.locator("[data-job]").get_attribute("data-job")
        assert engine.job(job).state == "cancelled"
        page.reload()  # what goes on is found again
        held = page.get_by_role("article", name="held up")
        held.get_by_role("button", name="Cancel").wait_for()
        assert page.get_by_role("article").count() == count + 2
    held.get_by_role("button", name="Play").wait_for()
    third = page.get_by_role("article", name="a harp, 2").last
    strip_of(third)
    third.get_by_role("button", name="Play").click()
    until(page, "document.querySelector('audio').currentTime > 0.1")
    assert page.get_by_label("Seconds", exact=True).input_value() == str(SECONDS)  # settings too
    third.get_by_role("button", name="Remove").click()
    page.reload()
    page.get_by_role("article", name="held up").wait_for()
    assert page.get_by_role("article").count() == count + 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_small_screen_in_the_dark(page, scheme):
    page.emulate_media(color_scheme=scheme)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(paper[4:].split(",")[0]) < 60) == (scheme == "dark")
    page.set_viewport_size({"width": 320, "height": 640})
    for tab in ("Create", "Edit", "Loop", "Drafts", "About"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 320, tab
    page.get_by_text("curl --fail-with-body").wait_for()
    page.set_viewport_size({"width": 1200, "height": 900})


def test_nothing_was_complained_of_or_asked_elsewhere(page, wrong):
    assert wrong == []


def test_keys_and_hosts_hold_for_the_page(browser, engine, listening):
    with listening(engine, Access(keys=(KEY,)), page=True) as url:
        with pytest.raises(sync_api.Error, match="INVALID_AUTH_CREDENTIALS"):
            context = browser.new_context()
            context.new_page().goto(url)
        context.close()
        who = {"username": "", "password": KEY}
        context = browser.new_context(http_credentials=who)
        page = context.new_page()
        answer = page.goto(url)
        assert answer.headers["content-security-policy"] == route_page.POLICY
        page.get_by_text("tiny: ready").wait_for()
        assert page.get_by_role("article").count() == 0
        for path in ("/", "/page/main.js"):
            other = httpx.get(f"{url}{path}", headers={"Host": "evil.example"})
            assert other.status_code == 403
        context.close()


def test_a_server_without_a_page_has_none(client):
    assert client.get("/").status_code == client.get("/page/main.js").status_code == 404
