"""Pictures of the explorer, as the README has them.

    python -m nla_jax.view.shots --out docs/img \\
        --bundle runs/quickstart/bundle --compare runs/quickstart/bundle_warm

Needs Playwright and Chromium (`pip install 'nla_jax[test]'`, `apt-get install chromium`).
"""

import argparse
from pathlib import Path

from nla_jax.view import browser

TEXT = "The committee has said that the bank would not be able to pay its debts this year."
TOKEN = " debts"
# name -> (width, height, light or dark, with the second bundle)
SHOTS = {
    "explorer": (1240, 800, "light", True),
    "explorer_dark": (1240, 800, "dark", True),
    "explorer_phone": (390, 1300, "light", False),
}


def take(address: str, out: Path, names=SHOTS, text: str = TEXT, token: str = TOKEN) -> list[Path]:
    """Read `text` at the address, choose `token` once every token is coloured, and write OUT/NAME.png."""
    made = []
    with browser.opened() as opened:
        for name in names:
            width, height, scheme, _ = SHOTS[name]
            size = {"width": width, "height": height}
            page = opened.new_page(viewport=size, color_scheme=scheme, reduced_motion="reduce")
            page.set_default_timeout(600_000)
            page.goto(address)
            page.fill("#text", text)
            page.click("#submit")
            page.locator(".token", has_text=token.strip()).first.click()
            for done in ("#map rect.hit", ".side .figure"):
                page.wait_for_selector(done)
            page.wait_for_function(
                "() => [...document.querySelectorAll('.token')].every((t) => t.title) && "
                "document.querySelector('#stop').classList.contains('off')"
            )
            page.evaluate("document.activeElement.blur()")
            made.append(out / f"{name}.png")
            page.screenshot(path=made[-1])
            page.close()
    return made


def main(argv=None) -> None:
    from nla_jax.view import engine, server, sides

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bundle", required=True)
    p.add_argument("--compare", default="")
    p.add_argument("--out", required=True, type=Path)
    args = p.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    opened = sides.open_sides(args.bundle, args.compare)
    for both in (True, False):
        names = [n for n, shot in SHOTS.items() if shot[3] is both]
        shown = opened if both else {"a": opened["a"]}
        with browser.serving(server.app(engine.Engine(shown))) as address:
            for path in take(address, args.out, names):
                print(f"{path}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    from nla_jax import cli

    cli._use_cache()
    main()
