"""The page of a collection: its figures, pictures of duplicates, and pictures of reliable groups."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import torch

from crosslevel import report
from crosslevel.data.duplicates.across import Match
from crosslevel.data.duplicates.scan import ScanResult
from crosslevel.data.duplicates.sets import NAMES, Member
from crosslevel.data.images import Images
from crosslevel.data.sources.folder import files_of
from crosslevel.inspection.scan import Structure
from crosslevel.inspection.summary import APART, tables

SETS = 100  # sets of duplicates with pictures; duplicates.csv has all
A_ROW = 10  # pictures
GROUPS = 30
BROKEN = 200
NamedFiles = Sequence[tuple[str, str | None]]
"""The name of each readable image, and its file if it is one."""


def page_blocks(
    figures: dict[str, Any], scanned: ScanResult, structure: Structure, duplicates: Sequence[Member], part: Images
) -> list[report.Block]:
    """The tables, and pictures of duplicates, tracks and groups, each with its file."""
    all_files, blocks = files_of(part), []
    files = [all_files[i] for i in scanned.numbers.tolist()]
    for heading, rows in tables(figures):
        columns = ["setting", "value", "reason"] if len(rows[0]) == 3 else ["", ""]
        blocks.append(report.table(heading, columns, rows, None))
    histogram = figures["shorter_side"]
    blocks.append(report.bars("Sizes: the shorter side in pixels", list(histogram), list(histogram.values())))
    blocks += _sets(scanned, duplicates, files)
    blocks.append(
        report.image_rows(
            "Near-duplicates: the largest tracks, and some of two images or more",
            _track_rows(scanned, structure, files),
        )
    )
    if figures["long_tail"]["separation"] >= APART:
        sizes = figures["long_tail"]["by_track"]["sizes"]
        names = [str(i + 1) for i in range(len(sizes))]
        blocks.append(report.bars("Estimated groups: tracks in each", names, sizes, figures["long_tail"]["trust"]))
        blocks.append(report.image_rows("Estimated groups, the largest first", _group_rows(scanned, structure, files)))
    if figures["broken"]:
        listed = list(figures["broken"].items())[:BROKEN]
        note = f"{len(listed):,} of {len(figures['broken']):,}" if len(listed) < len(figures["broken"]) else ""
        blocks.append(report.table("Broken files", ["file", "why"], listed, None, note=note))
    return blocks


def headline(figures: dict[str, Any]) -> str:
    """Summarize the collection in two sentences."""
    near, copies = figures["near_duplicates"], sum(figures["duplicates"]["copies"].values())
    broken, readable = len(figures["broken"]), figures["readable"]
    share = 100 * near["images_in_tracks_of_several"] / max(1.0, near["tracks"] * near["mean_track"])
    which = "compared images" if figures["compared"] < figures["looked_at"] else "images"
    damage = f", {broken:,} cannot" if broken else ""
    many = (
        f"{share:.0f} % of the {which} have near-duplicates, in {near['tracks']:,} tracks"
        if near["images_in_tracks_of_several"]
        else f"No two {which} are near-duplicates"
    )
    return f"{readable:,} images can be read{damage}. {many}; {copies:,} of the {which} are copies of another one."


def matches_block(
    name: str, matched: Sequence[Match], scanned: ScanResult, scanned_second: ScanResult, figures: dict[str, Any]
) -> report.Block:
    """Pairs of an image and its copy or near-duplicate in the second source."""
    rows = []
    for match, row in zip(matched[:SETS], figures["beside"]["matches"], strict=False):
        marks = [os.path.basename(row["path"]), os.path.basename(row["beside"])]
        pictures = [scanned.pictures[match.first], scanned_second.pictures[match.second]]
        rows.append(report.ImageRow(f"{row['kind']}, distance {row['distance']}", pictures, marks))
    note = f"the first {SETS} of {len(matched):,}; beside.csv has all" if len(matched) > SETS else ""
    return report.image_rows(f"Images that {name} has as well", rows, note)


def _sets(scanned: ScanResult, duplicates: Sequence[Member], files: NamedFiles) -> list[report.Block]:
    """Pictures and names of the sets of copies; the image to keep is framed."""
    rows, total = [], 0
    for _, several in itertools.groupby(duplicates, lambda member: member.set):
        copies = list(several)
        if all(member.keep for member in copies):
            continue  # views are shown with the tracks
        total += 1
        if total > SETS:
            continue
        representative, row = copies[0], copies[:A_ROW]
        names = [os.path.basename(files[member.number][0]) for member in row]
        kinds = ["keep" if member.kind is None else NAMES[member.kind] for member in row]
        marks = [f"{name}: {kind}" for name, kind in zip(names, kinds, strict=True)]
        outlines = ["query" if member.kind is None else None for member in row]
        caption = f"{len(copies):,} images; keep {files[representative.number][0]} ({representative.reason})"
        pictures = [scanned.pictures[member.number] for member in row]
        rows.append(report.ImageRow(caption, pictures, marks, outlines, [files[member.number] for member in row]))
    note = f"the first {SETS} of {total:,} sets; duplicates.csv has all" if total > SETS else ""
    return [report.image_rows("Copies: the image to keep is framed", rows, note)] if rows else []


def _track_rows(scanned: ScanResult, structure: Structure, files: NamedFiles) -> list[report.ImageRow]:
    names, sizes = structure.tracks.unique(return_counts=True)
    order = sizes.argsort(descending=True, stable=True)
    order = order[: int((sizes > 1).sum())]
    ranks = torch.linspace(0, len(order) - 1, min(len(order), 12)).long().unique()
    rows = []
    for track, size in zip(names[order[ranks]].tolist(), sizes[order[ranks]].tolist(), strict=True):
        indices = (structure.tracks == track).nonzero().squeeze(1)
        sample = indices[torch.linspace(0, len(indices) - 1, min(len(indices), A_ROW)).long()]
        sample_files = [files[i] for i in sample.tolist()]
        rows.append(
            report.ImageRow(
                f"{size:,} images: {sample_files[0][0]} ...", list(scanned.pictures[sample]), files=sample_files
            )
        )
    return rows


def _group_rows(scanned: ScanResult, structure: Structure, files: NamedFiles) -> list[report.ImageRow]:
    """Some tracks of each group, one image of each."""
    rows = []
    for group in range(min(int(structure.groups.max()) + 1, GROUPS)):
        indices = (structure.groups == group).nonzero().squeeze(1)
        own_tracks = structure.tracks[indices].unique(return_inverse=True)[1]
        count = int(own_tracks.max()) + 1
        first = torch.full((count,), len(own_tracks)).scatter_reduce_(
            0, own_tracks, torch.arange(len(own_tracks)), "amin"
        )
        sample = indices[first[torch.linspace(0, count - 1, min(count, A_ROW)).long()]]
        caption = f"Group {group + 1}: {count:,} tracks, {len(indices):,} images"
        sample_files = [files[i] for i in sample.tolist()]
        rows.append(report.ImageRow(caption, list(scanned.pictures[sample]), files=sample_files))
    return rows
