// Pictures of a video at given seconds, drawn in the browser from a player that nobody sees.

const SEEK_SECONDS = 4; // a player that takes longer will not come
const PAINT_SECONDS = 1; // likewise for a picture that is due

function whenItSays(target, name, seconds) {
  return new Promise((resolve, reject) => {
    const late = setTimeout(() => reject(new Error(`no ${name}`)), seconds * 1000);
    const end = (settle) => (value) => {
      clearTimeout(late);
      settle(value);
    };
    target.addEventListener(name, end(resolve), { once: true });
    target.addEventListener("error", end(reject), { once: true });
  });
}

/** A player may say that it has sought while it still paints the picture before. */
function whenItPaints(video) {
  return new Promise((resolve) => {
    setTimeout(resolve, PAINT_SECONDS * 1000);
    video.requestVideoFrameCallback?.(resolve) ?? resolve();
  });
}

/**
 * Fill canvases with what the video shows, one after the other; true once all are drawn.
 * wanted: [{canvas, seconds}]; isStale: says whether nobody waits any more.
 */
export async function drawThumbnails(url, wanted, height, isStale) {
  const video = document.createElement("video");
  video.muted = true;
  video.preload = "auto";
  try {
    const loaded = whenItSays(video, "loadeddata", SEEK_SECONDS);
    video.src = url;
    await loaded;
    for (const { canvas, seconds } of wanted) {
      if (isStale()) return false;
      const target = Math.min(seconds, Math.max(0, video.duration - 0.05));
      if (video.currentTime !== target) {
        const ready = Promise.all([whenItSays(video, "seeked", SEEK_SECONDS), whenItPaints(video)]);
        video.currentTime = target;
        await ready;
      }
      canvas.height = height * devicePixelRatio;
      canvas.width = Math.round((canvas.height * video.videoWidth) / video.videoHeight);
      canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
    }
    return true;
  } catch {
    // A file that this browser cannot show has bars and no pictures.
    return false;
  } finally {
    video.removeAttribute("src");
    video.load();
  }
}
