"""The explorer: `nla serve`."""
