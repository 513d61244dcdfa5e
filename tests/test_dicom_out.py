"""What examples/dicom_out.py writes is read back by pydicom."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from auditing.samples import PREPROCESSING, model_file

import diffsal

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("highdicom")
SCRIPT = Path(__file__).parents[1] / "examples" / "dicom_out.py"


def radiograph(path, **elements):
    """A computed radiograph of 48 × 60 pixels, as small as the standard lets it be."""
    source = pydicom.Dataset()
    source.file_meta = pydicom.dataset.FileMetaDataset()
    source.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    source.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    source.SOPInstanceUID, source.StudyInstanceUID = "1.2.3", "1.2.4"
    source.file_meta.MediaStorageSOPClassUID = source.SOPClassUID
    source.file_meta.MediaStorageSOPInstanceUID = source.SOPInstanceUID
    source.SeriesInstanceUID = "1.2.5"
    source.PatientID, source.PatientName, source.PatientSex = "7", "Doe^Jane", "O"
    for name in ("PatientBirthDate", "AccessionNumber", "ReferringPhysicianName"):
        setattr(source, name, "")
    source.StudyID, source.StudyDate, source.StudyTime = "1", "20260101", "120000"
    source.Modality, source.SeriesNumber, source.InstanceNumber = "CR", 1, 1
    source.Rows, source.Columns, source.SamplesPerPixel = 48, 60, 1
    source.PhotometricInterpretation, source.PixelRepresentation = "MONOCHROME2", 0
    source.BitsAllocated, source.BitsStored, source.HighBit = 16, 12, 11
    values = np.random.default_rng(0).integers(0, 4096, (48, 60), np.uint16)
    source.PixelData = values.tobytes()
    for name, value in elements.items():
        setattr(source, name, value)
    source.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("elements", [{}, {"ImagerPixelSpacing": [0.2, 0.2]}])
def test_a_radiograph_gets_a_picture_and_a_map_in_logits(tmp_path, elements):
    path, weights = radiograph(tmp_path / "image.dcm", **elements), model_file(tmp_path / "w.pt")
    runpy.run_path(str(SCRIPT))["main"]([str(path), str(weights), str(tmp_path / "out")])

    loaded = diffsal.load_model(weights)
    maps = diffsal.explain(loaded.model, PREPROCESSING(path)[None])
    expected = PREPROCESSING.place(maps.difference[0], (48, 60)).numpy()
    written = pydicom.dcmread(tmp_path / "out" / "difference.dcm")
    assert written.SOPClassUID.name == "Parametric Map Storage"
    np.testing.assert_allclose(written.pixel_array, expected, rtol=1e-5, atol=1e-7)
    shared = written.SharedFunctionalGroupsSequence[0]
    mapping = shared.RealWorldValueMappingSequence[0]
    assert mapping.MeasurementUnitsCodeSequence[0].CodeMeaning == "logits per cell"
    assert (mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept) == (1.0, 0.0)

    picture = pydicom.dcmread(tmp_path / "out" / "figure.dcm")
    assert picture.SOPClassUID.name == "Secondary Capture Image Storage"
    figure = maps.figure(path, classes=loaded.classes, preprocessing=PREPROCESSING)
    width, height = (round(side * figure.dpi) for side in figure.get_size_inches())
    assert picture.pixel_array.shape == (height, width, 3)
    assert torch.tensor(picture.pixel_array).float().std() > 10
    for one in (written, picture):
        assert (one.StudyInstanceUID, one.PatientID) == ("1.2.4", "7")
    assert picture.SourceImageSequence[0].ReferencedSOPInstanceUID == "1.2.3"
    series = written.ReferencedSeriesSequence[0]
    assert series.ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == "1.2.3"
