"""DO THE NAMES TELL THE TRUTH: copy a small module, call it again with one weight changed, see what moves.

made_up_inputs ─▶ calls (what inner modules were called with) ─▶ bench (a copied module and its call)
  ─▶ feed_forward, attention (the probes; responses reads what one unit of an MLP passes on)
  ─▶ verifying (every group of sites to its probe) ─▶ claims (confirmed, refuted or unverified)
"""
