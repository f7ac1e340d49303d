"""`cache-teacher report`: what a cache holds and what the teacher said, as one self-contained HTML page.

`scan` decodes positions, `sets` finds the samples, `rankings` the strangest sequences; `figures` shows what these say,
`browser` some samples token by token (`script` is the page's own), and `page` puts all of it together.
"""
