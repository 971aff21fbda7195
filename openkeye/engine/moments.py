"""From counts over the tokens of a prompt to the moments of its videos."""

from itertools import pairwise

from openkeye.engine.request import Request
from openkeye.engine.video_evidence import Moment, VideoEvidence
from openkeye.inputs.processor import Processor
from openkeye.inputs.prompt import Picture
from openkeye.inputs.video import Frames, VideoRequest


def read_evidence(request: Request, processor: Processor) -> list[VideoEvidence] | None:
    """The evidence of an answer, video by video; None where nobody asked for it."""
    if request.evidence is None:
        return None
    frames = iter([picture for picture in request.pictures if picture.is_frame])
    videos = []
    for number, video in enumerate(request.prompt.videos):
        pictures = [next(frames) for _ in video.times_seconds]
        videos.append(_video_evidence(number, video, pictures, request, processor))
    return videos


def _video_evidence(
    number: int, video: Frames | VideoRequest, pictures: list[Picture], request: Request, processor: Processor
) -> VideoEvidence:
    evidence = request.evidence
    assert evidence is not None
    counts, weights, num_picks = evidence.counts_P(), evidence.weights_P(), max(evidence.num_picks, 1)
    moments = []
    for picture, seconds, (start, end) in zip(pictures, video.times_seconds, _spans(video), strict=True):
        num_tokens = len(processor.encode_frame_text(seconds)) + picture.num_tokens
        tokens = slice(picture.first_token + picture.num_tokens - num_tokens, picture.first_token + picture.num_tokens)
        count = int(counts[tokens].sum())
        share = count / (num_picks * num_tokens)
        moments.append(Moment(seconds, start, end, num_tokens, count, share, float(weights[tokens].sum())))
    share = sum(moment.count for moment in moments) / (num_picks * sum(moment.num_tokens for moment in moments))
    weight = sum(moment.weight for moment in moments)
    return VideoEvidence(number, evidence.num_selective > 0, share, weight, moments)


def _spans(video: Frames | VideoRequest) -> list[tuple[float, float]]:
    """What each frame stands for, seconds: from halfway to the one before it to halfway to the next, of the sampled part."""
    times = video.times_seconds
    middles = [(first + second) / 2 for first, second in pairwise(times)]
    last = min(2 * times[-1] - middles[-1], video.duration_seconds) if middles else video.duration_seconds
    edges = [times[0], *middles, max(last, times[-1])]
    return list(pairwise(edges))
