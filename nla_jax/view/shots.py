"""Take the README's screenshots of the explorer.

    python -m nla_jax.view.shots --out docs/img \\
        --bundle runs/smollm2_135m/bundle --compare runs/smollm2_135m/bundle_warm

Needs Playwright and Chromium (`pip install 'nla_jax[test]'`, `apt-get install chromium`).
"""

import argparse
from pathlib import Path

from nla_jax.view import browser

TEXT = "The old lighthouse keeper climbed the stairs one last time, because the storm had put out"
TOKEN = "put"
SHOTS = {  # name -> (width, height, light or dark)
    "explorer": (1240, 800, "light"),
    "explorer_dark": (1240, 800, "dark"),
    "explorer_phone": (390, 1100, "light"),
}


def take_screenshots(address: str, out: Path, text: str = TEXT, token: str = TOKEN) -> list[Path]:
    """Open the address, read `text`, click `token`, and write OUT/NAME.png once every token is coloured."""
    made = []
    with browser.open_browser() as opened:
        for name, (width, height, scheme) in SHOTS.items():
            size = {"width": width, "height": height}
            page = opened.new_page(viewport=size, color_scheme=scheme, reduced_motion="reduce")
            page.set_default_timeout(0)
            page.goto(address)
            page.fill("#text", text)
            page.click("#submit")
            page.locator(".token", has_text=token).first.click()
            page.wait_for_function(
                "() => document.querySelector('#stop').classList.contains('off') && "
                "[...document.querySelectorAll('.token')].every((t) => t.title)"
            )
            page.evaluate("document.activeElement.blur()")
            made.append(out / f"{name}.png")
            page.screenshot(path=made[-1])
            page.close()
    return made


def main(argv=None) -> None:
    from nla_jax.interchange import find_bundle
    from nla_jax.view.explorer import bundles, engine, server

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bundle", default="", help="directory; default: the bundle of the package")
    p.add_argument("--compare", default="")
    p.add_argument("--out", required=True, type=paths.path)
    args = p.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    opened = engine.Engine(bundles.open_sides(find_bundle.find(args.bundle), args.compare))
    with browser.serve_app(server.app(opened)) as address:
        for path in take_screenshots(address, args.out):
            print(f"{path}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    import jax

    from nla_jax.util import paths

    jax.config.update("jax_compilation_cache_dir", paths.programs_dir())
    main()
