"""Evidence for values: the words of a document's pages and its record come in, and where each value stands on them goes out.

    words on page 1: …, Total, EUR, 1.234,50      and  {"total": 1234.5}
    -> $.total  page 1  (430.2, 610.0, 481.7, 621.1) pt  "1.234,50"  normalized  places 1

`text_layer` keeps words in a ledger, `page_index` finds texts, numbers (`numbers`) and dates (`dates`) among them, `places` chooses
where a value stands that is printed several times, and `match` says how each value of a record is witnessed. The words know nothing of
the model's answer, and nothing here asks a model.
"""
