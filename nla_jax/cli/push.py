"""`nla push`: upload a bundle or an exported pair to the Hugging Face Hub."""

from nla_jax.cli import flags, parser


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = parser.add(sub, "push", "upload a bundle or an exported pair to the Hugging Face Hub",
                   "nla push runs/mine/packed ada/nla-qwen3-4b-L20 --dry-run")
    p.add_argument("dir", metavar="DIR",
                   help="a bundle, a run that has one, or the directory of `nla pack` or `nla export`")
    p.add_argument("repo", metavar="REPO",
                   help="OWNER/NAME on the Hub; a pair goes to OWNER/NAME-av and OWNER/NAME-ar")
    p.add_argument("--dry-run", action="store_true", help="only print what would go; nothing is sent")
    p.add_argument("--public", action="store_true",
                   help="make a new repository public; default: private, an existing one is left as it is")
    p.add_argument("--license", default="", metavar="ID",
                   help="licence for the card; default: that of the card or of the target, if it is known")
    p.add_argument("--base-model", default="", metavar="ID",
                   help="the target's id on the Hub; default: as in the sidecar")
    p.add_argument("--revision", default="", metavar="NAME", help="a branch; default: main")
    p.add_argument("--message", default="", metavar="TEXT", help="the message of the commit")
    p.add_argument("--json", action="store_true", help="print JSON instead of text")
    p.set_defaults(work=_push)


def _push(args, rest) -> None:
    import sys

    import nla_jax
    from nla_jax.interchange import hub_files, hub_push

    found = hub_files.plan(args.dir, args.repo, licence=args.license, base=args.base_model)
    if args.dry_run:
        if args.json:
            flags.put_json("-", [_as_json(u, args) for u in found])
        else:
            for upload in found:
                _print(upload, args)
        return
    message = args.message or f"nla push, nla_jax {nla_jax.__version__}"
    sent = []
    for upload in found:
        for note in upload.notes:
            print(f"{upload.repo}: {note}", file=sys.stderr)
        where = hub_push.push(upload, message=message, revision=args.revision, public=args.public,
                              tell=lambda words: print(words, file=sys.stderr))
        sent.append({"repo": upload.repo, "commit": where})
    if args.json:
        flags.put_json("-", sent)
    else:
        for one in sent:
            print(f"pushed: {one['commit']}")


def _as_json(upload, args) -> dict:
    return {"repo": upload.repo, "revision": args.revision or "main", "public": args.public,
            "files": {name: upload.size(name) for name in sorted(upload.files)},
            "left_out": upload.left_out, "notes": upload.notes, "card": upload.card}


def _print(upload, args) -> None:
    """Print files with sizes, what is left out and why, and the head of the card."""
    kind = "public" if args.public else "private"
    total = sum(map(upload.size, upload.files))
    print(f"{upload.repo}, {args.revision or 'main'}: {len(upload.files)} files, {total / 1e6:,.1f} MB would "
          f"go; a new repository would be {kind}")
    flags.print_pairs([(f"  {upload.size(name):>15,}", name) for name in sorted(upload.files)])
    for name, why in upload.left_out.items():
        flags.print_pairs([("  left out:", f"{name}: {why}")])
    for note in upload.notes:
        flags.print_pairs([("  note:", note)])
    print("  the card begins:")
    for line in upload.card.split("\n")[:40]:
        flags.print_pairs([("    ", line)])
