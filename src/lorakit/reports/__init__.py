"""Reports: records and run folders turned into terminal tables, pictures and one HTML page.

Every function here is pure presentation: it reads records, returns text or bytes, and cannot change a result.

    spectrum     numbers that describe singular values: effective rank, energy kept, norm relative to the base
    wording      how a number, a size or a text is written
    comparison   what a summary says: measures side by side, facts, proof lines, the headline
    tables       the same for a terminal (rich)
    theme        colours and axes of the pictures, and how they become bytes
    panels       the drawings of losses, mistakes and scores; layers_panel that of the singular values
    figures      drawings on pages, as PNG or SVG
    html         run folder -> report.html
"""
