"""Masks of the documents that are packed into a sample."""

from nlgmoe.data.sources import Sample


def mark_documents(sample: Sample, eod_id: int, attention: bool, mask_loss: bool) -> Sample:
    """Add where documents begin, for attention, for the loss, for both or for neither.

    An end-of-document token that is read opens a document: its target is that document's first token.

        tokens      c  EOD  a  b  EOD  a      (a window that begins inside a document)
        targets    EOD  a   b EOD  a   b
        document    0   1   1  1   2   2
        loss_mask   1   0   1  1   0   1

    Args:
        sample: not changed.
        eod_id: id of the end-of-document token.
        attention: add `document`, the number of the document that each position belongs to.
        mask_loss: add `loss_mask`, which leaves out padding and the first token of every document, which
            cannot be predicted from the tokens before it.
    """
    borders = sample["tokens"] == eod_id
    marked = sample.copy()
    if attention:
        marked["document"] = borders.cumsum(0)
    if mask_loss:
        marked["loss_mask"] = sample["token_mask"] & ~borders
    return marked
