"""Repositories on a hub: listed once, then read by ranges without a download, or downloaded if they must be.

hub id ── listing ──▶ HubListing ─┬─ open_hub, remote ──▶ SafetensorsStore over ranges
                                  └─ downloading ──▶ the hub's own cache     (errors: answers)
"""
