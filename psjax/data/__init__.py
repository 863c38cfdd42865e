"""Data sets in memory, and their batches as index arrays.

There are loaders for images with labels, for spoken words as features, and for sparse samples with
very many labels. The batches of an epoch are flat, sorted by label, or in tiles of one label, and
their order may be stratified. Loaders need the packages of `psjax[data]`; batches need only NumPy.
"""

from psjax import _public
from psjax.data._batches import Batches as Batches
from psjax.data._batches import batches as batches
from psjax.data._batches import batches_by_label as batches_by_label
from psjax.data._batches import check_labels as check_labels
from psjax.data._batches import most_of_a_label as most_of_a_label
from psjax.data._batches import stratified_order as stratified_order
from psjax.data._batches import tiles_by_label as tiles_by_label
from psjax.data._images import Dataset as Dataset
from psjax.data._images import OwnRows as OwnRows
from psjax.data._images import load as load
from psjax.data._images import load_classes as load_classes
from psjax.data._images import take as take
from psjax.data._recordings import WORDS as WORDS
from psjax.data._sparse import SparseDataset as SparseDataset
from psjax.data._sparse import pad_rows as pad_rows
from psjax.data._sparse import read_xc as read_xc
from psjax.data._sparse import write_xc as write_xc
from psjax.data._speech import LogMel as LogMel
from psjax.data._speech import SpeechDataset as SpeechDataset
from psjax.data._speech import load_speech as load_speech
from psjax.data._speech import log_mel as log_mel

__dir__ = _public.listing(globals())
