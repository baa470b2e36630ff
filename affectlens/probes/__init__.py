"""What a matrix does, asked of the forward pass: a small module copied, called again, one weight changed.

guessing inputs ─▶ feeding (what inner modules were called with) ─▶ bench (a copy, and that call)
                ─▶ probing MLPs, attending (attentions), answering: what one unit passes on
"""
